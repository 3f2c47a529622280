"""Associative recall: pairs are written, a long filler follows, and questions whose answers are in memory alone end it.

A document is filler with pairs of a key and its value in it. Its questions, a segment for each distance, name keys that
were written about that many tokens before; what follows a key there is its value. Values are drawn anew for every
document, so without memory of it a model can know that a value comes next, and no more.

The frozen backbone is a tiny GPT-NeoX that has learnt the same task within a segment, where pairs come again a few
tokens later. The memory read is then trained on documents of some hundred tokens, and tested on long ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longmem.backbones import Backbone, huggingface_backbone
from longmem.config import LongMemConfig
from longmem.data.stream import IGNORE
from longmem.memory import MemoryBank
from longmem.model import LongMem

CONDITIONS = ("memory", "empty memory", "other memory")
Progress = Callable[[str, float], object]


@dataclass(frozen=True)
class RecallConfig:
    """The task, and how long each part is trained.

    Attributes:
        keys, values, fillers: tokens of each kind, in this order in the vocabulary.
        pairs: that are asked for, per document and distance.
        distractors: share of the filler that is pairs nobody asks for.
        segment: tokens encoded at once.
        distances: tested; an answer lies that many tokens back, and at most two segments more.
        documents: tested.
        find_steps, sharpen_steps: of the backbone; the first at most, see `pretrain_backbone`.
        train_steps: of the memory read. train_context: tokens of its documents before the questions.
        rows: documents side by side, everywhere.
    """

    keys: int = 64
    values: int = 16
    fillers: int = 16
    pairs: int = 12
    distractors: float = 0.1
    segment: int = 64
    distances: tuple[int, ...] = (1024, 4096, 16_384, 65_536)
    documents: int = 64
    find_steps: int = 1500
    sharpen_steps: int = 300
    train_steps: int = 80
    train_context: int = 2048
    rows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        block = 2 * self.segment
        if self.pairs * (len(self.distances) + 1) > self.keys or 2 * self.pairs > self.segment:
            raise ValueError(
                f"RecallConfig: {self.pairs} pairs at {len(self.distances)} distances need more than"
                f" {self.keys} keys or {self.segment} tokens a segment"
            )
        if list(self.distances) != sorted(set(self.distances)) or any(d % block for d in self.distances):
            raise ValueError(f"RecallConfig: distances must ascend in multiples of {block}, got {self.distances}")
        if self.train_context % block or self.documents % self.rows:
            raise ValueError(
                f"RecallConfig: wanted train_context a multiple of {block} and documents one of {self.rows}, got"
                f" {self.train_context} and {self.documents}"
            )

    @property
    def vocabulary(self) -> int:
        return self.keys + self.values + self.fillers

    def stages(self) -> dict[str, int]:
        """The stages of `run_recall`, in order, and the steps of each: of the first at most."""
        pieces = -(-self.capacity // (16 * self.segment))
        batches = self.documents // self.rows
        filling = {"fill memory": batches * pieces, "test": batches * len(self.distances)}
        return {"pretrain": self.find_steps, "sharpen": self.sharpen_steps, "train": self.train_steps, **filling}

    @property
    def capacity(self) -> int:
        """Tokens of the bank that is tested: the longest distance, and the pairs that lie as far back."""
        return max(self.distances) + 2 * self.segment


# Some seconds instead of a minute, on two cores.
QUICK = {"distances": (1024, 4096), "documents": 32, "sharpen_steps": 150, "train_steps": 60, "train_context": 1024}


@dataclass(frozen=True)
class RecallReport:
    """correct: condition -> distance -> [documents] float64, share of a document's questions answered right.

    chance: what guessing gives. within_segment: what the frozen backbone recalls of its local context. questions: per
    condition and distance.
    """

    correct: dict[str, dict[int, Tensor]]
    chance: float
    within_segment: float
    questions: int

    def accuracy(self, condition: str, distance: int) -> tuple[float, float]:
        """Mean over documents and its standard error."""
        values = self.correct[condition][distance]
        return float(values.mean()), float(values.std() / math.sqrt(len(values)))

    def table(self) -> str:
        distances = list(self.correct["memory"])
        lines = [f"{'the answer, tokens back':<26}" + "".join(f"{distance:>16,}" for distance in distances)]
        for condition in self.correct:
            cells = [self.accuracy(condition, distance) for distance in distances]
            lines.append(f"{condition:<26}" + "".join(f"{f'{mean:.1%} ± {error:.1%}':>16}" for mean, error in cells))
        lines.append(f"{'chance':<26}" + f"{self.chance:>16.1%}" * len(distances))
        lines.append(
            f"{self.questions} questions per cell; within a segment the frozen backbone recalls"
            f" {self.within_segment:.1%}"
        )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: condition -> distance -> accuracy and standard error, and what the table says beside it."""
        cells = {
            condition: {
                str(distance): dict(zip(("accuracy", "error"), self.accuracy(condition, distance), strict=True))
                for distance in row
            }
            for condition, row in self.correct.items()
        }
        about = {"chance": self.chance, "within_segment": self.within_segment, "questions": self.questions}
        return {"accuracy": cells} | about


def run_recall(
    config: RecallConfig, device: torch.device | str = "cpu", progress: Progress | None = None
) -> RecallReport:
    """Pretrain the backbone, train the read, test it.

    `progress` is told what is going on after each step of it, and the accuracy or loss.

    Raises:
        RuntimeError: the backbone did not learn to recall within a segment.
    """

    def told(stage: str, value: float) -> None:
        if progress is not None:
            progress(stage, value)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, within_segment = pretrain_backbone(config, told)
        model = LongMem(backbone.to(device), longmem_config(config))
        train_read(model, config, told)
        return evaluate_recall(model, config, within_segment, told)


def longmem_config(config: RecallConfig) -> LongMemConfig:
    return LongMemConfig(memory_layers=(1,), segment=config.segment, memory_tokens=config.capacity, chunks_per_query=32)


def pretrain_backbone(config: RecallConfig, told: Progress) -> tuple[Backbone, float]:
    """The backbone, and the share of pairs that it recalls within a segment.

    First with few pairs, until it has found what to do; then with more, and with matches by chance held down: memory
    is searched by the means of a chunk's keys, where they add up.
    """
    model, rate, average = _untrained(config), 4e-3, 0.0
    heads = model.config.num_attention_heads
    seen: list[Tensor] = []
    model.gpt_neox.layers[1].attention.query_key_value.register_forward_hook(lambda *call: seen.append(call[2]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    found = None
    for step in range(config.find_steps + config.sharpen_steps):
        if found is None and average > 0.95:
            found = step
        if found is None and step == config.find_steps:
            raise RuntimeError(f"recall: the backbone recalls {average:.1%} within a segment after {step} steps")
        if found is not None and step == found + config.sharpen_steps:
            break
        left = 1.0 if found is None else 1 - (step - found) / config.sharpen_steps
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 30) * left
        few = (3, config.segment // 4) if found is None else (config.pairs, config.segment // 2)
        tokens, targets = _repeated_pairs(config, *few)
        seen.clear()
        logits = model(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        if found is not None:
            query, key, _ = seen[0].unflatten(-1, (heads, 3, -1)).transpose(1, 2).unbind(3)
            loss = loss + 0.2 * (query @ key.mT / query.shape[-1] ** 0.5).square().mean()
        _step(optimizer, loss)
        right = float((logits.argmax(-1) == targets)[targets != IGNORE].float().mean())
        average += (right - average) / 20
        told("pretrain" if found is None else "sharpen", right)
    return huggingface_backbone(model, "recall"), average


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _untrained(config: RecallConfig) -> Any:
    """Two layers, the first of which has a head that looks at the token before, as some head of every trained model
    does: finding that takes most of the training of such a model. Positions turn an eighth of each head alone, so that
    keys can be matched at any distance."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    heads, head_dim = 1, 64
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocabulary,
            hidden_size=heads * head_dim,
            intermediate_size=2 * heads * head_dim,
            num_hidden_layers=2,
            num_attention_heads=heads,
            rotary_pct=0.125,
            tie_word_embeddings=True,
            max_position_embeddings=config.segment,
            initializer_range=0.12,
        )
    )
    model.gpt_neox.embed_in.weight.data.normal_(std=0.5)
    angle = model.gpt_neox.rotary_emb.inv_freq
    turned, strength = len(angle), 6.5
    fused = model.gpt_neox.layers[0].attention.query_key_value
    weight, bias = fused.weight.data.view(heads, 3, head_dim, -1), fused.bias.data.view(heads, 3, head_dim)
    weight[0, :2] *= 0.02
    bias[0, 1, :turned] = strength
    # The key, turned back by one position.
    bias[0, 0, :turned], bias[0, 0, turned : 2 * turned] = strength * angle.cos(), -strength * angle.sin()
    return model


def _repeated_pairs(config: RecallConfig, pairs: int, units: int) -> tuple[Tensor, Tensor]:
    """`units` pairs, [rows, 2 * units], out of few that come again and again; the targets are values seen before."""
    rows = config.rows
    keys = torch.rand(rows, config.keys).argsort(1)[:, :pairs]
    values = torch.randint(config.values, (rows, pairs)) + config.keys
    which = torch.randint(pairs, (rows, units))
    filler = torch.rand(rows, units) < 0.2
    tokens = torch.stack([keys.gather(1, which), values.gather(1, which)], -1)
    tokens = torch.where(filler[..., None], _filler(config, tokens.shape), tokens).flatten(1)
    before = (which[:, :, None] == which[:, None]) & ~filler[:, None]
    seen = before.tril(-1).any(-1) & ~filler
    targets = tokens.roll(-1, 1)
    targets[:, 1::2] = IGNORE
    targets[:, ::2].masked_fill_(~seen, IGNORE)
    return tokens, targets


def _filler(config: RecallConfig, shape: tuple[int, ...] | torch.Size) -> Tensor:
    return torch.randint(config.fillers, shape) + config.keys + config.values


def documents(config: RecallConfig, length: int, distances: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Contexts [rows, length] and questions [len(distances), rows, 2 * pairs]: keys and, after each, its value.

    Pairs lie at even places, so that no segment parts them.
    """
    rows, pairs, block = config.rows, config.pairs, 2 * config.segment
    asked = pairs * len(distances)
    keys = torch.rand(rows, config.keys).argsort(1)
    values = torch.randint(config.values, (rows, config.keys)) + config.keys
    units = length // 2
    other = torch.randint(asked, config.keys, (rows, units))
    context = torch.stack([keys.gather(1, other), values.gather(1, other)], -1)
    filler = torch.rand(rows, units, 1) >= config.distractors
    context = torch.where(filler, _filler(config, (rows, units, 2)), context)
    questions = []
    for index, distance in enumerate(distances):
        mine = slice(index * pairs, (index + 1) * pairs)
        couples = torch.stack([keys[:, mine], values[:, mine]], -1)
        begin = (length - distance - block) // 2
        places = begin + torch.rand(rows, block // 2).argsort(1)[:, :pairs]
        context.scatter_(1, places[..., None].expand(-1, -1, 2), couples)
        order = torch.rand(rows, pairs).argsort(1)[..., None].expand(-1, -1, 2)
        questions.append(couples.gather(1, order).flatten(1))
    return context.flatten(1), torch.stack(questions)


def train_read(model: LongMem, config: RecallConfig, told: Progress) -> None:
    """Train the memory read on short documents, each with several questions."""
    device, block = model.backbone.device, 2 * config.segment
    # A temperature is a single number, and has far to go.
    rates = [1e-1 if "temperature" in name else 1e-3 for name in model.trainable()]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(model.trainable().values(), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    memory = model.new_memory(config.rows, tokens=config.train_context)
    step = 0
    while step < config.train_steps:
        distances = torch.randperm(config.train_context // block)[: len(config.distances)] * block
        context, questions = documents(config, config.train_context, tuple(distances.tolist()))
        memory.reset()
        model.remember(context.to(device), memory)
        for question in questions[: config.train_steps - step].to(device):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min((step + 1) / 5, 1 - step / config.train_steps)
            tokens, targets = _ask(question)
            loss = model(tokens, memory, targets=targets, write=False).loss
            assert loss is not None
            _step(optimizer, loss)
            told("train", loss.item())
            step += 1


def _ask(question: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 2 * pairs] keys and values -> tokens, and the values as targets of their keys."""
    targets = question.roll(-1, 1)
    targets[:, 1::2] = IGNORE
    return question, targets


@torch.no_grad()
def evaluate_recall(model: LongMem, config: RecallConfig, within_segment: float, told: Progress) -> RecallReport:
    """Ask for pairs at every distance, with a full bank of the document, an empty one, and another document's."""
    device = model.backbone.device
    correct: dict[str, dict[int, list[Tensor]]] = {name: {d: [] for d in config.distances} for name in CONDITIONS}
    memory, empty = model.new_memory(config.rows), model.new_memory(config.rows, tokens=config.segment)
    for _ in range(config.documents // config.rows):
        context, questions = documents(config, config.capacity, config.distances)
        memory.reset()
        for begin in range(0, config.capacity, 16 * config.segment):
            model.remember(context[:, begin : begin + 16 * config.segment].to(device), memory)
            told("fill memory", begin / config.capacity)
        for distance, question in zip(config.distances, questions.to(device), strict=True):
            # Another's memory: every row asks what the row before it has in memory.
            for name, bank, asked in (
                ("memory", memory, question),
                ("empty memory", empty, question),
                ("other memory", memory, question.roll(1, 0)),
            ):
                correct[name][distance].append(_answered(model, bank, asked))
            told("test", float(correct["memory"][distance][-1].mean()))
    joined = {name: {d: torch.cat(values) for d, values in row.items()} for name, row in correct.items()}
    return RecallReport(joined, 1 / config.values, within_segment, config.documents * config.pairs)


def _answered(model: LongMem, memory: MemoryBank, question: Tensor) -> Tensor:
    """[B] float64, the share of each row's questions that are answered right."""
    tokens, targets = _ask(question)
    right = model(tokens, memory, write=False).logits.argmax(-1) == targets
    return right[:, ::2].double().mean(1).cpu()
