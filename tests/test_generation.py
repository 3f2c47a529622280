"""Generation: decodes what the full forward computes, row by row, and stops and samples as asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import VOCABULARY, tiny_backbone, tiny_huggingface, tiny_longmem
from transformers import LogitsProcessorList, MaxLengthCriteria, MinLengthLogitsProcessor, StoppingCriteriaList

from longmem import LongMem, LongMemConfig, huggingface_backbone
from longmem.generation import History, Sampler, SegmentDecoder

DECODED = ["llama", "mistral", "qwen3", "gemma", "gemma3", "gpt2", "gpt_neox", "bloom", "paper"]
SEGMENT = 12


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length))


def filled_memory(model: LongMem, rows: int, seed: int = 0) -> Any:
    """A memory that holds a document of its own for each row."""
    memory = model.new_memory(rows)
    ids = torch.randint(0, VOCABULARY, (8, 30), generator=torch.Generator().manual_seed(seed))
    model.remember(ids[:rows], memory)
    return memory


def generated(model: LongMem, prompt: torch.Tensor, memory: Any, count: int = 15, **options: Any) -> torch.Tensor:
    return torch.stack(list(model.generate(prompt, memory, max_new_tokens=count, **options)), 1)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, name: str = "") -> None:
    """To rounding, at the scale of what was wanted."""
    torch.testing.assert_close(
        got, wanted, atol=1e-5 * max(1.0, float(wanted.abs().max())), rtol=1e-4, msg=lambda text: f"{name} {text}"
    )


@pytest.mark.parametrize("sidenet", ["none", "exact"])
@pytest.mark.parametrize("family", DECODED)
def test_decoding_equals_the_full_forward(family: str, sidenet: str) -> None:
    model = tiny_longmem(family, sidenet=sidenet, memory_layers=(1, 3))
    ids = tokens(2, 40)
    memory = model.new_memory(2)
    with torch.no_grad():
        full = torch.cat([model(piece, memory).logits for piece in ids.split(SEGMENT, 1)], 1)
        decoder = SegmentDecoder(model, model.new_memory(2), rows=2)
        steps = [decoder.feed(piece) for piece in ids.split([5, *[1] * 9, 17, *[1] * 9], 1)]
    ends = torch.tensor([5, *range(6, 15), 31, *range(32, 41)]) - 1
    assert_close(torch.stack(steps, 1), full[:, ends])


@pytest.mark.parametrize("length", [1, 11, 12, 13, 24, 31])
def test_a_prompt_of_any_length_leaves_what_feeding_it_leaves(length: int) -> None:
    model, ids = tiny_longmem(memory_layers=(1, 3)), tokens(2, length)
    memories = [model.new_memory(2) for _ in range(2)]
    with torch.no_grad():
        at_once = SegmentDecoder(model, memories[0], rows=2).prompt(ids)
        decoder = SegmentDecoder(model, memories[1], rows=2)
        one_by_one = [decoder.feed(token) for token in ids.split(1, 1)]
    assert_close(at_once, one_by_one[-1])
    for name, tensor in memories[0].state_dict().items():
        assert torch.equal(tensor, memories[1].state_dict()[name]), name


def test_the_encoder_goes_no_further_than_the_sidenet_starts_until_a_segment_is_full() -> None:
    model, ids = tiny_longmem(memory_layers=(1, 3)), tokens(1, SEGMENT)
    depths = []
    for depth, layer in enumerate(model.backbone.layers):
        layer.register_forward_hook(lambda *_, depth=depth: depths.append(depth))
    decoder = SegmentDecoder(model, model.new_memory(1), rows=1)
    ran = []
    with torch.no_grad():
        for token in ids.split(1, 1):
            depths.clear()
            decoder.feed(token)
            ran.append(list(depths))
    once = list(range(len(model.backbone.layers)))  # layer 0 by the encoder, the others by the SideNet
    assert ran[:-1] == [once] * (SEGMENT - 1)
    assert ran[-1] == [*once, 0, 1, 2], "the keys of layers 1 and 3, of the whole segment at once"


@pytest.mark.parametrize("options", [{}, {"sidenet": "exact", "fusion": "gated"}])
@pytest.mark.parametrize("family", DECODED)
def test_a_padded_row_gives_what_it_gives_alone(family: str, options: dict[str, Any]) -> None:
    """Logits of every step, while rows fill their segments at different steps, and memories at the end."""
    model = tiny_longmem(family, memory_layers=(1, 3), **options)
    lengths, steps = [3, 17, 30, 12], 20
    prompts = [tokens(1, length) for length in lengths]
    following = tokens(len(lengths), steps)
    padded = torch.full((len(lengths), max(lengths)), VOCABULARY + 5)  # no token at all
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt, 1

    def logits(decoder: SegmentDecoder, prompt: torch.Tensor, mask: Any, rest: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([decoder.prompt(prompt, mask), *(decoder.feed(token) for token in rest.split(1, 1))], 1)

    together = filled_memory(model, len(lengths))
    out = logits(SegmentDecoder(model, together, rows=len(lengths)), padded, mask, following)
    state = together.state_dict()
    for row, prompt in enumerate(prompts):
        alone = model.new_memory(1)
        ids = torch.randint(0, VOCABULARY, (8, 30), generator=torch.Generator().manual_seed(0))
        model.remember(ids[row : row + 1], alone)
        mine = logits(SegmentDecoder(model, alone, rows=1), prompt, None, following[row : row + 1])
        assert_close(out[row], mine[0])
        for name, tensor in alone.state_dict().items():
            assert_close(state[name][row], tensor[0], name)


def test_a_padded_batch_without_memory_gives_what_transformers_gives() -> None:
    """Within one segment LongMem without memory is the backbone: tokens, padding, penalty and end are those of
    `generate` in transformers."""
    theirs = tiny_huggingface("llama")
    model = LongMem(huggingface_backbone(theirs, "llama"), LongMemConfig(memory_layers=(2,), segment=64))
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = mask[2, :1] = 0
    ids[mask == 0] = 0
    for penalty in (1.0, 1.3):
        options = {"max_new_tokens": 20, "repetition_penalty": penalty}
        wanted = theirs.generate(
            ids, attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )
        rows = [0, 1, 2] if penalty == 1.0 else [1]  # transformers penalises the padding token too
        got = generated(model, ids, None, 20, mask=mask, repetition_penalty=penalty)
        assert torch.equal(got[rows], wanted[rows, 9:])


def test_generation_is_greedy_at_temperature_zero_and_seeded_above() -> None:
    model, prompt = tiny_longmem(), tokens(2, 7)
    greedy = generated(model, prompt, model.new_memory(2))
    memory, ids = model.new_memory(2), torch.cat([prompt, greedy], 1)
    full = torch.cat([model(piece, memory).logits for piece in ids.split(SEGMENT, 1)], 1)
    assert torch.equal(full[:, 6:-1].argmax(-1), greedy)

    def sampled(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return generated(model, prompt, model.new_memory(2), 8, temperature=1.0, generator=generator).tolist()

    assert sampled(1) == sampled(1) != sampled(2)


def test_tokens_come_one_by_one() -> None:
    model = tiny_longmem()
    steps = model.generate(tokens(1, 3), max_new_tokens=2)
    calls: list[int] = []
    model.backbone.embed.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    for step in steps:
        assert step.shape == (1,) and step.dtype == torch.int64
        seen.append(len(calls))
    assert seen == [1, 2]


def test_a_row_ends_at_its_end_token_and_the_others_go_on() -> None:
    """After its end a row yields padding, writes nothing, and leaves the other rows as they are."""
    model, prompt, count = tiny_longmem(), tokens(3, 7), 40
    memory = filled_memory(model, 3)
    free = generated(model, prompt, memory, count)
    # A token that ends row 0 in its first segments, and leaves another row to the end.
    eos = next(token for token in free[0, 3:].tolist() if any(token not in row for row in free.tolist()))
    ends = [row.index(eos) if eos in row else count - 1 for row in free.tolist()]
    assert ends[0] < SEGMENT < max(ends) == count - 1
    stopped_memory = filled_memory(model, 3)
    stopped = generated(model, prompt, stopped_memory, count, eos=eos, pad=5)
    for row, end in enumerate(ends):
        assert torch.equal(stopped[row, : end + 1], free[row, : end + 1])
        assert (stopped[row, end + 1 :] == 5).all()
    for row, end in enumerate(ends):
        assert stopped_memory.ring.cursor[row] == 30 + (7 + end) // SEGMENT * SEGMENT


def test_generation_ends_when_all_rows_have() -> None:
    model, prompt = tiny_longmem(), tokens(2, 7)
    free = generated(model, prompt, None)
    ends = {int(row[4]) for row in free}
    out = generated(model, prompt, None, eos=ends)
    first = max(min(row.tolist().index(end) for end in ends if end in row.tolist()) for row in free)
    assert out.shape[1] == first + 1 <= 5


def test_logits_processors_and_stopping_criteria_of_transformers() -> None:
    model, prompt = tiny_longmem(), tokens(2, 7)
    eos = int(generated(model, prompt, None, 1)[0])
    processor = LogitsProcessorList([MinLengthLogitsProcessor(11, eos)])
    criteria = StoppingCriteriaList([MaxLengthCriteria(13)])
    out = generated(model, prompt, None, logits_processor=processor, stopping_criteria=criteria)
    assert out.shape[1] == 13 - 7 and eos not in out[0, :4].tolist()


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    history = History(torch.zeros(2000, 1, dtype=torch.int64), None)

    def kept(top_p: float) -> set[int]:
        return set(Sampler(1.0, top_p)(logits, history).tolist())

    assert kept(0.5) == {0} and kept(0.51) == {0, 1} and kept(1.0) == {0, 1, 2, 3}


def test_the_repetition_penalty_is_for_what_a_row_has_had() -> None:
    history = History(torch.tensor([[3, 1], [3, 2]]), torch.tensor([[0, 1], [1, 1]]))
    sampler = Sampler(repetition_penalty=2.0)
    logits = torch.tensor([[0.0, 6.0, -5.0, 4.0], [0.0, -6.0, 5.0, 4.0]])
    assert sampler(logits, history).tolist() == [3, 2 if 5.0 / 2 > 4.0 / 2 else 3]
    history.append(torch.tensor([3, 3]))
    assert sampler(logits, history).tolist() == [1, 2]


def test_a_padded_row_is_penalised_for_its_own_tokens_alone() -> None:
    model, prompt = tiny_longmem(), tokens(1, 5)
    padded = torch.cat([torch.full((1, 3), VOCABULARY + 5), prompt], 1)  # no token at all
    both, mask = torch.cat([padded, tokens(1, 8)]), torch.ones(2, 8)
    mask[0, :3] = 0
    options = {"repetition_penalty": 1.5, "count": 20}
    alone = generated(model, prompt, model.new_memory(1), **options)
    assert torch.equal(generated(model, both, model.new_memory(2), mask=mask, **options)[:1], alone)
    assert not torch.equal(generated(model, prompt, model.new_memory(1), count=20), alone)


def test_top_k_keeps_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    history = History(torch.zeros(2000, 1, dtype=torch.int64), None)
    kept = [set(Sampler(1.0, top_k=k)(logits, history).tolist()) for k in (1, 2, 9, 0)]
    assert kept == [{0}, {0, 1}, {0, 1, 2, 3}, {0, 1, 2, 3}]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(temperature: float, wrong: float) -> None:
    history = History(torch.zeros(1, 1, dtype=torch.int64), None)
    with pytest.raises(FloatingPointError, match="the logits of the model are not finite"):
        Sampler(temperature)(torch.tensor([[0.0, wrong, 1.0]]), history)


def test_extreme_options_choose_the_likeliest_or_evenly() -> None:
    logits = torch.tensor([[-50.0, 80.0, 79.9]]).expand(500, 3)
    history = History(torch.zeros(500, 1, dtype=torch.int64), None)
    assert set(Sampler(1e-320)(logits, history).tolist()) == {1}
    assert set(Sampler(1e300)(logits, history).tolist()) == {0, 1, 2}
    for penalty in (1e-3, 1e3):
        Sampler(1.0, repetition_penalty=penalty)(logits, history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature >= 0 and 0 < top_p <= 1"),
        ({"top_p": 0.0}, "temperature >= 0 and 0 < top_p <= 1"),
        ({"temperature": float("nan")}, "temperature must be finite, got nan"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be finite, got inf"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
        ({"top_p": 1.5}, "temperature >= 0 and 0 < top_p <= 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must lie in \[0.001, 1000.0\], got 0.0"),
        ({"mask": torch.tensor([[1, 1, 0]])}, "padding must be on the left"),
        ({"mask": torch.zeros(1, 3)}, "padding must be on the left, and every row must hold a token"),
        ({"mask": torch.ones(1, 4)}, r"mask must have the shape of tokens, \(1, 3\), got \(1, 4\)"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(tiny_longmem().generate(tokens(1, 3), max_new_tokens=1, **options))


def test_prompts_that_do_not_fit_are_named() -> None:
    for prompt in (tokens(1, 0), tokens(1, 3)[0]):
        with pytest.raises(ValueError, match=r"generate: (n must be at least 1|tokens must have 2 axes)"):
            next(tiny_longmem().generate(prompt, max_new_tokens=1))
    assert tiny_backbone().max_segment is None
