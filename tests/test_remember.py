"""Texts read into memory: padded on either side, longer than fits, in several rows, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import VOCABULARY, tiny_longmem

from longmem import LongMem, MemoryBank

PADDED = ["llama", "mistral", "gemma3", "gpt2", "gpt_neox", "bloom", "paper"]


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length))


def encoded_whole(model: LongMem, texts: list[torch.Tensor], memory: MemoryBank) -> None:
    """Every segment of every text written, the rows side by side, as `remember` did when it left nothing out."""
    segment = model.config.segment
    for begin in range(0, max(map(len, texts)), segment):
        some = [row for row, text in enumerate(texts) if begin < len(text)]
        pieces = [texts[row][begin : begin + segment] for row in some]
        longest = max(map(len, pieces))
        ids, mask = (
            torch.zeros(len(some), longest, dtype=torch.int64),
            torch.zeros(len(some), longest, dtype=torch.bool),
        )
        for row, piece in enumerate(pieces):
            ids[row, : len(piece)], mask[row, : len(piece)] = piece, True
        states = model.backbone.encode(ids, model.config.memory_layers, ())
        memory.write(states.key, states.value, mask, some)


def held(memory: MemoryBank) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in memory.state_dict().items()}


def assert_same(one: MemoryBank, other: MemoryBank) -> None:
    for name, tensor in held(one).items():
        assert torch.equal(tensor, held(other)[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("options", "before", "length"),
    [
        ({}, 0, 200),
        ({}, 7, 203),  # a chunk open at the beginning and at the end
        ({"chunk_size": 8, "memory_tokens": 16}, 3, 121),  # memory of little more than a segment
        ({"chunk_size": 5, "memory_tokens": 60}, 4, 301),  # segments that end within chunks
        ({"chunk_size": 1, "memory_tokens": 7}, 2, 99),
        ({"memory_tokens": 64}, 0, 64),
        ({"memory_tokens": 64}, 5, 65),
        ({"scope": "shared"}, 5, 150),
        ({"scope": "shared", "chunk_size": 5, "memory_tokens": 60}, 5, 150),
    ],
)
def test_what_will_be_overwritten_is_not_encoded_and_the_memory_is_the_same_to_the_bit(
    options: dict[str, Any], before: int, length: int, dtype: torch.dtype
) -> None:
    model = tiny_longmem(memory_layers=(1, 3), **options)
    memory, whole = model.new_memory(2, dtype=dtype), model.new_memory(2, dtype=dtype)
    if before:
        earlier = tokens(2, before)
        for bank in (memory, whole):
            encoded_whole(model, list(earlier), bank)
    text, encoded = tokens(2, length), []
    encode = model.backbone.encode
    model.backbone.encode = lambda ids, *rest: (encoded.append(ids.numel()), encode(ids, *rest))[1]  # type: ignore[assignment]
    told: list[int] = []
    kept = model.remember(text, memory, progress=told.append)
    model.backbone.encode = encode  # type: ignore[method-assign]
    encoded_whole(model, list(text), whole)
    assert_same(memory, whole)
    assert sum(told) == 2 * length
    rows = 2 if options.get("scope") == "shared" else 1
    size, capacity = model.config.chunk_size, model.config.memory_tokens
    stays = min(rows * length, capacity + (rows * (before + length)) % size)
    assert sum(kept) == stays * (3 - rows)
    # No more than a memory and what bit equality asks for: a segment that is partly kept, and tails that come round.
    assert sum(encoded) <= min(2 * length, 2 * (max(capacity, size * 12 * rows) + 3 * 12 * rows)), sum(encoded)


def test_rows_of_unequal_lengths_skip_each_its_own() -> None:
    model = tiny_longmem(memory_layers=(1, 3), memory_tokens=32)
    texts = [tokens(1, length)[0] for length in (300, 20, 0, 97)]
    longest = 300
    padded, mask = torch.full((4, longest), VOCABULARY + 3), torch.zeros(4, longest, dtype=torch.bool)
    for row, (text, right) in enumerate(zip(texts, (0, 7, 0, 50), strict=True)):  # padding left, or on both sides
        stop = longest - right
        padded[row, stop - len(text) : stop], mask[row, stop - len(text) : stop] = text, True
    memory, whole = model.new_memory(5), model.new_memory(4)
    rows = [3, 0, 4, 1]
    kept = model.remember(padded, memory, mask, rows)
    encoded_whole(model, texts, whole)
    assert kept == [32, 20, 0, 33]
    for place, row in enumerate(rows):
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(memory.state_dict()[name][row], tensor[place], atol=1e-5, rtol=1e-4, msg=name)
    assert memory.ring.cursor.tolist() == [20, 97, 0, 300, 0]


def test_an_interrupted_text_leaves_no_memory_that_makes_no_sense() -> None:
    model = tiny_longmem(memory_tokens=32)
    memory = model.new_memory(2)
    model.remember(tokens(2, 24), memory)

    def interrupted(_: int) -> None:
        if interrupted.calls:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        interrupted.calls = 1  # type: ignore[attr-defined]

    interrupted.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        model.remember(tokens(1, 400), memory, rows=[1], progress=interrupted)
    assert memory.ring.cursor.tolist() == [24, 0]


def test_bad_tokens_anywhere_are_refused_before_anything_is_written() -> None:
    model = tiny_longmem()
    memory, ids = model.new_memory(1), tokens(1, 100)
    ids[0, 90] = VOCABULARY
    with pytest.raises(ValueError, match=rf"\[0, {VOCABULARY}\), got"):
        model.remember(ids, memory)
    assert memory.ring.cursor.tolist() == [0]


@pytest.mark.parametrize("family", PADDED)
def test_padding_on_either_side_changes_nothing(family: str) -> None:
    """Logits and what is stored, of every row, are those of the row alone: forward and remember, with a past."""
    for options in ({}, {"sidenet": "exact", "fusion": "gated"}):
        model = tiny_longmem(family, memory_layers=(1, 3), **options)  # type: ignore[arg-type]
        past, lengths, before = tokens(4, 24), [12, 5, 0, 7], [0, 7, 0, 2]
        ids, mask = torch.full((4, 12), VOCABULARY + 9), torch.zeros(4, 12, dtype=torch.bool)
        rows = [tokens(1, length) for length in lengths]
        for row, (part, first) in enumerate(zip(rows, before, strict=True)):
            ids[row, first : first + part.shape[1]], mask[row, first : first + part.shape[1]] = part, True
        memory, remembered = model.new_memory(4), model.new_memory(4)
        for bank in (memory, remembered):
            model.remember(past, bank)
        logits = model(ids, memory, mask=mask).logits
        assert logits.isfinite().all()
        model.remember(ids, remembered, mask)
        for row, (part, first) in enumerate(zip(rows, before, strict=True)):
            alone = model.new_memory(1)
            model.remember(past[row : row + 1], alone)
            if part.shape[1]:
                wanted = model(part, alone).logits[0]
                scale = max(1.0, float(wanted.detach().abs().max()))
                found = logits[row, first : first + part.shape[1]]
                torch.testing.assert_close(found, wanted, atol=1e-5 * scale, rtol=1e-4)
            for bank in (memory, remembered):
                for name, tensor in alone.state_dict().items():
                    scale = max(1.0, float(tensor.abs().max()))
                    torch.testing.assert_close(bank.state_dict()[name][row], tensor[0], atol=1e-5 * scale, rtol=1e-4)


def test_padding_is_not_seen_without_a_memory_either() -> None:
    model, ids = tiny_longmem(), tokens(1, 7)
    padded, mask = torch.cat([tokens(1, 5), ids], 1), torch.arange(12)[None] >= 5
    torch.testing.assert_close(model(padded, mask=mask).logits[:, 5:], model(ids).logits, atol=1e-4, rtol=1e-4)
    loss = model(padded, mask=mask, targets=padded).loss
    loss.backward()
    assert all(
        parameter.grad.isfinite().all() for parameter in model.trainable().values() if parameter.grad is not None
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[True, False, True, True], [True] * 4]), "between those of row 0"),
        (torch.tensor([[True] * 4, [False, True, False, True]]), "between those of row 1"),
        (
            torch.ones(2, 3, dtype=torch.bool),
            r"mask must be bool of the shape of tokens, \(2, 4\), got torch.bool \(2, 3\)",
        ),
        (torch.ones(2, 4), r"mask must be bool .*, got torch.float32 \(2, 4\)"),
        ([[True] * 4] * 2, "got list"),
    ],
)
def test_other_masks_are_refused_in_words(mask: Any, message: str) -> None:
    model = tiny_longmem()
    memory = model.new_memory(2)
    for call in (model.remember, model):
        with pytest.raises(ValueError, match=message):
            call(tokens(2, 4), memory, mask=mask)
    assert memory.ring.cursor.tolist() == [0, 0]


def test_states_that_know_nothing_of_padding_on_the_left_are_refused_with_it() -> None:
    model, ids = tiny_longmem(), tokens(2, 12)
    states = model.backbone.encode(ids, model.config.memory_layers, model.sidenet.depths)
    mask = torch.arange(12) >= torch.tensor([[0], [4]])
    with pytest.raises(ValueError, match="padding on the left, but the states were encoded as if"):
        model.read_states(states, model.new_memory(2), mask=mask)
    model.read_states(states, model.new_memory(2), mask=mask.flip(1))
    model.read_states(states, model.new_memory(2), mask=mask & torch.tensor([[False], [False]]))


def test_rows_are_written_without_touching_the_others() -> None:
    memory = MemoryBank(rows=3, kv_heads=1, head_dim=4, tokens=16, chunk_size=4)
    key, value = torch.randn(2, 1, 6, 4), torch.randn(2, 1, 6, 4)
    memory.write(key, value, rows=[2, 0])
    assert memory.ring.cursor.tolist() == [6, 0, 6]
    assert torch.equal(memory.ring.key[2, 0, 0], key[0, 0, :4]) and not memory.ring.store[1].any()
    for rows in ([0, 0], [3, 1], [-1, 0]):
        with pytest.raises(ValueError, match="rows must be different ones of 0 to 2"):
            memory.write(key, value, rows=rows)
    with pytest.raises(ValueError, match=r"\[2, 1, T, 4\], got shape \(1, 1, 6, 4\)"):
        memory.write(key[:1], value[:1], rows=[0, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_is_nothing_that_a_model_could_have_no_states_for(family: str) -> None:
    """A token whose embedding is not a number reaches no other, where it is nowhere but in the filling."""
    model = tiny_longmem(family)
    embed = model.backbone.embed
    embed.weight = torch.nn.Parameter(embed.weight.detach().clone(), requires_grad=False)
    embed.weight[0] = torch.nan
    ids, mask = torch.randint(1, VOCABULARY, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    mask[0, :5], mask[1, 5:], mask[2] = False, False, False
    memory = model.new_memory(3)
    model.remember(ids, memory, mask)
    output = model(ids, memory, mask=mask, targets=ids)
    assert output.logits[mask].isfinite().all() and output.loss is not None and output.loss.isfinite()
    output.loss.backward()
    assert all(x.grad.isfinite().all() for x in model.trainable().values() if x.grad is not None)
    assert memory.ring.store.isfinite().all()
    padded, alone = (
        list(model.generate(prompt, max_new_tokens=3, mask=hidden))
        for prompt, hidden in ((ids[:1], mask[:1]), (ids[:1, 5:], None))
    )
    assert torch.equal(torch.stack(padded), torch.stack(alone))


def test_targets_at_padding_do_not_count() -> None:
    model, ids = tiny_longmem(), torch.randint(0, VOCABULARY, (1, 12))
    mask = torch.arange(12)[None] >= 5
    losses = [model(ids, mask=mask, targets=ids.masked_fill(~mask, filling)).loss for filling in (-100, 3, -1)]
    assert losses[0] == losses[1] == losses[2]
    torch.testing.assert_close(losses[0], model(ids[:, 5:], targets=ids[:, 5:]).loss)
