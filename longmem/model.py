"""LongMem: frozen backbone, SideNet and memory bank assembled into a model that trains, evaluates and generates."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmem_kernels._checks import Sizes, check_device, check_dtype, check_integer, check_truth

from .backbones.base import Backbone, States, check_backbone
from .backbones.fingerprint import difference
from .backbones.layers import Positions
from .backbones.load import find_backbone, load_backbone, place_of
from .config import LongMemConfig
from .data.stream import IGNORE
from .files import check_tensors, load_tensors, naming, save_tensors, save_text, short, show
from .generation import Sampler, Stop, decode
from .memory import MemoryBank, check_rows
from .padding import check_mask, fill_padding, token_spans
from .precision import multiply_as
from .remember import remember
from .sharded import ShardedMemoryBank
from .sidenet import SideNet

_KIND, _WEIGHTS, CONFIG = "longmem model", "longmem.safetensors", "config.json"
ABOUT = {"config": dict, "backbone": str, "fingerprint": str}  # in both files
_CHANGEABLE = {"segment", "memory_tokens", "chunks_per_query", "chunk_size", "scope", "special_tokens"}


@dataclass(frozen=True)
class Output:
    """logits [B, T, vocabulary]; loss: mean negative log likelihood in nats of the targets, None without targets."""

    logits: Tensor
    loss: Tensor | None


class LongMem(nn.Module):
    """A frozen language model with a long-term memory (arXiv 2306.07174).

    >>> model = LongMem(huggingface_backbone(hf_model), LongMemConfig(memory_layers=(20,)))
    >>> memory = model.new_memory(rows=1)
    >>> for tokens, targets in segments:  # consecutive segments of one document
    ...     model(tokens, memory, targets=targets).loss.backward()

    The backbone may be in float32, bfloat16, float16 or float64, and be used under `torch.autocast` or not. What trains
    is in float32 at least, and multiplies in the backbone's format.

    Raises:
        ValueError: the configuration does not fit the backbone.
        TypeError: `backbone` is no Backbone.
    """

    def __init__(self, backbone: Backbone, config: LongMemConfig) -> None:
        super().__init__()
        check_backbone("LongMem", backbone)
        if not isinstance(config, LongMemConfig):
            raise TypeError(f"LongMem: config must be a LongMemConfig, got {type(config).__name__}")
        config.check(len(backbone.layers), backbone.max_segment)
        self.backbone, self.config = backbone, config
        self.sidenet = SideNet(backbone, config)
        self.sidenet.to(backbone.device)
        self.fingerprint = f"{backbone.fingerprint()}/layers {', '.join(map(str, config.memory_layers))}"

    def forward(
        self,
        tokens: Tensor,
        memory: MemoryBank | None = None,
        *,
        targets: Tensor | None = None,
        new_document: Tensor | None = None,
        mask: Tensor | None = None,
        write: bool = True,
    ) -> Output:
        """One segment per row: encode, read memory, predict, then write the segment to memory.

        Call `backward` before the memory is used again: gradients are computed from the memory as it was read, and a
        backward pass after it has changed raises RuntimeError.

        Args:
            tokens: [B, T] int64, T at most `config.segment`.
            memory: the rows' memory, read and then changed in place; None for local context alone.
            targets: [B, T] int64, the next tokens; -100 is ignored, and so is what stands at padding.
            new_document: [B] bool, rows whose memory is emptied first.
            mask: [B, T] bool, False at padding, left or right of a row's tokens: it is not seen and not written. What
                the logits say there means nothing.
            write: whether the segment is written to memory.

        Raises:
            ValueError: tokens, targets or a mask that do not fit the model or each other, or a memory that was made by
                another one; nothing is changed then.
            TypeError: an argument of another type.
        """
        self._check(tokens, memory)
        check_truth("LongMem", "write", write)
        positions = None
        if mask is not None:
            check_mask("LongMem", mask, tokens)
            starts, _ = token_spans("LongMem", mask)
            tokens = fill_padding(tokens, mask, starts)
            positions = Positions.in_columns(starts, 0, tokens.shape[1], tokens.device)
        self.backbone.check_tokens(tokens)
        if targets is not None:
            targets = self._checked(targets, mask, tuple(tokens.shape))
        if new_document is not None:
            Sizes("LongMem").bind("new_document", new_document, f"{len(tokens)}")
            check_dtype("LongMem", "new_document", new_document, (torch.bool,))
            check_device("LongMem", tokens.device, "tokens", new_document=new_document)
            if memory is not None:
                memory.reset(new_document)
        states = self.backbone.encode(tokens, self.config.memory_layers, self.sidenet.depths, positions=positions)
        return self.read_states(states, memory, targets=targets, mask=mask, write=write)

    def read_states(
        self,
        states: States,
        memory: MemoryBank | None,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        write: bool = True,
        shares: list[Tensor] | None = None,
    ) -> Output:
        """`forward` from the backbone's states on: training over cached states starts here.

        Args:
            mask: as in `forward`; padding on the left only where `states` were encoded with positions that say so.
            shares: see `SideNet.forward`.

        Raises:
            ValueError: targets, or a mask, that do not fit the states (values are read on the CPU alone).
        """
        if targets is not None:
            targets = self._checked(targets, mask, (states.key.shape[0], states.key.shape[2]))
        unaware = states.positions is None or states.positions.key_mask is None
        if mask is not None and unaware and mask.device.type == "cpu" and bool((mask.any(1) & ~mask[:, 0]).any()):
            raise ValueError(
                "LongMem: mask has padding on the left, but the states were encoded as if tokens stood there; pass"
                " tokens and mask to forward, or positions to Backbone.encode"
            )
        logits = self.logits(self.sidenet(states, memory, shares=shares))
        loss = None
        if targets is not None:
            # In float32, and defined (zero) when every target is ignored.
            total = F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            loss = total / (targets != IGNORE).sum().clamp(min=1)
        # After the read, so that a segment never retrieves itself.
        if memory is not None and write:
            memory.write(states.key, states.value, mask)
        return Output(logits, loss)

    def remember(
        self,
        tokens: Tensor,
        memory: MemoryBank,
        mask: Tensor | None = None,
        rows: Sequence[int] | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[int]:
        """Write tokens [R, n] of any length to memory, segment by segment, without predicting anything.

        Segments that later ones will overwrite are not encoded; the memory is what encoding them would leave.

        Args:
            mask: [R, n] bool, False at padding, left or right of a row's tokens: it is not written, and each row's
                segments begin with its first token.
            rows: the R rows of memory that they belong to, the others stay as they are; default all, in order.
            progress: told the number of tokens that were just written, or found not to be worth it.

        Returns:
            of each row, how many of its tokens the memory now holds: all of them, unless they are more than fit.

        Raises:
            ValueError: tokens, mask or rows that do not fit the model, `memory` or each other; nothing is written.
        """
        _bind_tokens("remember", tokens, "R n")
        _check_memory("remember", memory)
        if rows is not None:
            rows = check_rows("remember", rows, memory.rows)
        self._check(tokens[:, : self.config.segment], memory, None if rows is None else len(rows))
        if mask is not None:
            check_mask("remember", mask, tokens)
        # All of them before any is written.
        if tokens.shape[1]:
            self.backbone.check_tokens(tokens if mask is None else tokens.masked_fill(~mask, 0))
        return remember(self, tokens, memory, mask, rows, progress)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output of the SideNet's last layer [B, T, E] -> logits [B, T, vocabulary]."""
        if self.sidenet.norm is None:
            return self.backbone.logits(hidden)
        with multiply_as(hidden):
            return self.backbone.head(self.sidenet.norm(hidden))

    def new_memory(
        self, rows: int, tokens: int | None = None, dtype: torch.dtype | None = None, *, sharded: bool = False
    ) -> MemoryBank:
        """An empty memory for `rows` batch rows.

        Args:
            tokens: capacity of a row, a multiple of `config.chunk_size`; default: `config.memory_tokens`.
            dtype: of the stored keys and values, whatever the backbone's: float32, bfloat16, float16, float64 or
                float8_e4m3fn, a quarter of float32 (`Ring`); default: the backbone's.
            sharded: over all processes of torch.distributed, see `ShardedMemoryBank`.

        Raises:
            ValueError: a size that is no such number.
            TypeError: a dtype that memory cannot be stored in.
        """
        layer = self.backbone.layer(self.config.memory_layers[0])
        kind = ShardedMemoryBank if sharded else MemoryBank
        return kind(
            rows=rows,
            layers=len(self.config.memory_layers),
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            tokens=self.config.memory_tokens if tokens is None else tokens,
            chunk_size=self.config.chunk_size,
            scope=self.config.scope,
            dtype=self.backbone.dtype if dtype is None else dtype,
            device=self.backbone.device,
            fingerprint=self.fingerprint,
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.sidenet.named_parameters() if parameter.requires_grad}

    def generate(
        self,
        tokens: Tensor,
        memory: MemoryBank | None = None,
        *,
        max_new_tokens: int,
        mask: Tensor | None = None,
        eos: int | Collection[int] | None = None,
        pad: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        generator: torch.Generator | None = None,
        logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
        stopping_criteria: Callable[[Tensor, Tensor], Tensor | bool] | None = None,
    ) -> Iterator[Tensor]:
        """Continue tokens [B, n], n >= 1, yielding [B] int64 per step, as soon as it is known.

        Incremental: each step encodes one token, and equals the full forward of the same segments. A row's segment goes
        to memory when it is full, and its local context begins anew; what the last one holds is not in memory. Rows do
        not depend on each other (unless they share a memory): each gives what it gives alone, padded or not.

        Args:
            mask: [B, n], zero (False) at padding, which must be on the left: it is neither seen, nor stored, nor
                counted. A tokenizer's attention mask, with `padding_side="left"`.
            eos: the token, or tokens, that end a row. From then on it yields `pad` (default: the smallest of `eos`),
                and generation ends when all rows have. A model's own: `longmem.text.stop_tokens`.
            temperature: 0 takes the most likely token; otherwise samples from the logits divided by it.
            top_p: samples from the smallest set of tokens whose probability reaches it.
            top_k: samples from so many most likely tokens; 0: from all.
            repetition_penalty: divides the positive and multiplies the negative logits of tokens that the row has had
                already (Keskar et al. 2019), 0.001 to 1,000; 1 changes nothing.
            logits_processor: `(ids [B, n + generated], logits [B, vocabulary]) -> logits`, after the penalty and before
                the temperature: a `LogitsProcessorList` of `transformers`, or one processor.
            stopping_criteria: `(ids, logits) -> bool [B]`, asked after every token: rows that are done. A
                `StoppingCriteriaList` of `transformers`, or one criterion.

        Raises:
            ValueError: options out of range, or tokens that do not fit the model.
            FloatingPointError: the logits of a step hold not-a-number or infinity.
        """
        max_new_tokens = check_integer("generate", "max_new_tokens", max_new_tokens, 0)
        _bind_tokens("generate", tokens, "B n").positive("n")
        if pad is not None:
            pad = check_integer("generate", "pad", pad, 0, self.backbone.vocab_size - 1)
        self._check(tokens[:, : self.config.segment], memory)
        sampler = Sampler(temperature, top_p, top_k, repetition_penalty, generator, logits_processor)
        return decode(self, tokens, memory, mask, max_new_tokens, sampler, Stop.at(eos, pad, stopping_criteria))

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write config.json and longmem.safetensors: what is trained. The backbone is named, and what the SideNet
        copies from it and keeps frozen is copied again. `weights`: the SideNet's `state_dict`, where the parameters
        themselves are in pieces (FSDP)."""
        folder, trained = Path(folder), self.trainable()
        about = {"config": self.config.to_dict(), "backbone": self.backbone.name, "fingerprint": self.fingerprint}
        about["backbone_place"] = place_of(self.backbone.name, folder)
        found = trained if weights is None else weights
        save_tensors(folder / _WEIGHTS, {name: found[name].detach().cpu() for name in trained}, _KIND, about)
        save_text(folder / CONFIG, json.dumps(about, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backbone: Backbone | None = None, *, device: torch.device | str = "cpu", **changes: Any
    ) -> LongMem:
        """Load what `save_pretrained` wrote, around `backbone` or, without one, around the backbone of the name that it
        was trained on, loaded to `device`. The backbone may be in another format than in training.

        Raises:
            ValueError: the folder holds no LongMem, or one that was trained on another backbone, or on one that cannot
                be loaded by its name.
        """
        fixed = changes.keys() - _CHANGEABLE
        if fixed:
            raise ValueError(
                f"LongMem.from_pretrained: of the configuration {', '.join(sorted(_CHANGEABLE))} may be changed, got"
                f" {', '.join(sorted(fixed))}"
            )
        if backbone is not None:
            check_backbone("LongMem.from_pretrained", backbone)
        file = Path(folder) / _WEIGHTS
        weights, about = load_tensors(file, _KIND, header=ABOUT)
        if backbone is None:
            try:
                place = about.get("backbone_place", {})
                backbone, _ = load_backbone(find_backbone(about["backbone"], place, Path(folder)), device)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"LongMem.from_pretrained: {folder} needs the backbone {about['backbone']!r}, which cannot be"
                    f" loaded by that name; pass it as `backbone` ({short(error, 200)})"
                ) from error
        with naming(f"{_KIND}: {file}"):
            config = LongMemConfig.from_dict(about["config"])
            config.check(len(backbone.layers), backbone.max_segment)
        model = cls(backbone, LongMemConfig.from_dict(config.to_dict() | changes))
        if reason := difference(about["fingerprint"], model.fingerprint):
            raise ValueError(
                f"LongMem.from_pretrained: {folder} was trained on backbone {show(about['backbone'])}, got"
                f" {backbone.name!r}: {reason}"
            )
        check_tensors(f"{_KIND}: {file}", weights, model.trainable(), any_float=True)
        if wrong := [name for name in weights if not bool(weights[name].isfinite().all())]:
            raise ValueError(f"{_KIND}: {file}: {len(wrong)} weights are not finite, among them {wrong[0]}")
        model.sidenet.load_state_dict(weights, strict=False)
        return model

    def _checked(self, targets: Tensor, mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """`targets` with IGNORE at padding."""
        if isinstance(targets, Tensor) and targets.shape != shape:
            raise ValueError(f"LongMem: targets must have the shape of tokens, {shape}, got {tuple(targets.shape)}")
        Sizes("LongMem").bind("targets", targets, "B T")
        check_dtype("LongMem", "targets", targets, (torch.int64,))
        check_device("LongMem", self.backbone.device, "the backbone", targets=targets)
        if mask is not None:
            targets = targets.masked_fill(~mask, IGNORE)
        vocabulary = self.backbone.vocab_size
        wrong = (
            (targets != IGNORE) & ((targets < 0) | (targets >= vocabulary)) if targets.device.type == "cpu" else None
        )
        if wrong is not None and bool(wrong.any()):
            raise ValueError(
                f"LongMem: targets must lie in [0, {vocabulary}) or be {IGNORE}, got {int(targets[wrong][0])}"
            )
        return targets

    def _check(self, tokens: Tensor, memory: MemoryBank | None, rows: int | None = None) -> None:
        _bind_tokens("LongMem", tokens, "B T")
        if tokens.dtype != torch.int64:
            raise ValueError(f"LongMem: tokens must be int64, got {tokens.dtype}")
        check_device("LongMem", self.backbone.device, "the backbone", tokens=tokens)
        if memory is not None:
            _check_memory("LongMem", memory)
        if tokens.shape[1] > self.config.segment:
            raise ValueError(
                f"LongMem: a segment holds at most {self.config.segment} tokens (config.segment), got {tokens.shape[1]}"
            )
        if memory is None:
            return
        if reason := difference(memory.fingerprint, self.fingerprint):
            raise ValueError(f"LongMem: the memory was made by another model: {reason}")
        if tokens.shape[0] != (memory.rows if rows is None else rows):
            wanted = f"the memory's {memory.rows}" if rows is None else f"the {rows} named"
            raise ValueError(f"LongMem: tokens must have {wanted} rows, got {tuple(tokens.shape)}")


def _bind_tokens(where: str, tokens: Any, symbols: str) -> Sizes:
    """Sizes of `tokens` by their symbols. Raises TypeError or ValueError for no tensor, or one of another rank."""
    if isinstance(tokens, Mapping):
        raise TypeError(
            f"{where}: tokens must be a tensor [{symbols}], got {type(tokens).__name__}; what a tokenizer returns holds"
            ' them as ["input_ids"]'
        )
    sizes = Sizes(where)
    sizes.bind("tokens", tokens, symbols)
    return sizes


def _check_memory(where: str, memory: Any) -> None:
    if not isinstance(memory, MemoryBank):
        raise TypeError(f"{where}: memory must be a MemoryBank (new_memory), got {type(memory).__name__}")
