"""The memory_attention reference: log-sum-exps, memory share, dropout, padding, float8 memory, autocast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_memory_attention import FUSIONS, Case, local_attention, make_case
from torch import Tensor

from longmem_kernels import memory_attention
from longmem_kernels.memory_attention.reference import dropout_keep

EVERYTHING = (("return_lse", True), ("return_memory_share", True))


def run(case: Case, **options: Any) -> Any:
    return replace(case, options=(*case.options, *options.items())).run()


def padded(B: int, S: int, hidden: int) -> Tensor:
    """A key mask [B, S]: row 0 without its first `hidden` keys."""
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, :hidden] = False
    return mask


# --- gradients of everything ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alibi": True, "window": 2, "S": 5},
        {"dropout_p": 0.4, "dropout_seed": 11},
        {"key_mask": padded(2, 3, 2)},
        {"key_mask": padded(2, 3, 3), "dropout_p": 0.2, "dropout_seed": 3},
        {"missing": "all"},
    ],
    ids=["plain", "alibi window", "dropout", "a query without local keys", "a row without local keys", "no memory"],
)
def test_gradients_of_all_outputs_are_right(fusion: str, options: dict[str, Any]) -> None:
    case = make_case(
        fusion, **{"B": 2, "H": 2, "G": 1, "T": 2, "S": 3, "D": 2, "M": 5, "memory_query": True, **options}
    )
    names = ["query", "key", "value", "memory_query"]
    inputs = [getattr(case, name).requires_grad_() for name in names]
    if case.gate is not None:
        names, inputs = [*names, "gate"], [*inputs, case.gate.double().requires_grad_()]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = run(replace(case, **dict(zip(names, tensors, strict=True))), **dict(EVERYTHING))
        return tuple(torch.where(result == -torch.inf, 0.0, result) for result in results)

    torch.autograd.gradcheck(outputs, inputs)


# --- log-sum-exps and share -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_log_sum_exps_are_those_of_the_scores(fusion: str) -> None:
    case = make_case(fusion, B=1, H=2, G=1, T=3, S=5, rings=1, scale=0.3)
    _, local_lse, memory_lse = run(case, return_lse=True)
    assert local_lse.dtype == memory_lse.dtype == torch.float64
    for h in range(2):
        for t in range(3):
            seen = case.key[0, 0, : 3 + t] @ case.query[0, h, t] * 0.3
            torch.testing.assert_close(local_lse[0, h, t], seen.exp().sum().log(), rtol=0, atol=1e-14)
            ids = case.chunk_ids[0, h, t]
            tokens = case.memory_key[0, 0, ids[ids >= 0].long()].flatten(0, 1)
            if len(tokens) == 0:
                assert memory_lse[0, h, t] == -torch.inf
                continue
            found = tokens @ case.query[0, h, t] * 0.3
            torch.testing.assert_close(memory_lse[0, h, t], found.exp().sum().log(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_share_is_the_weight_of_memory_in_the_output(fusion: str) -> None:
    """With local values 0 and memory values 1, the output is the share."""
    case = make_case(fusion, S=9, alibi=True)
    case = replace(case, value=torch.zeros_like(case.value), memory_value=torch.ones_like(case.memory_value))
    out, share = run(case, return_memory_share=True)
    torch.testing.assert_close(share[..., None].expand_as(out), out, rtol=0, atol=1e-14)
    missing = (case.chunk_ids < 0).all(-1)
    assert missing.any() and (share[missing] == 0).all() and (share[~missing] > 0).all()


def test_outputs_come_in_one_order() -> None:
    case = make_case()
    out, local_lse, memory_lse, share = run(case, **dict(EVERYTHING))
    assert torch.equal(out, run(case)) and torch.equal(share, run(case, return_memory_share=True)[1])
    for got, wanted in zip((out, local_lse, memory_lse), run(case, return_lse=True), strict=True):
        assert torch.equal(got, wanted)


# --- dropout ----------------------------------------------------------------------------------------------------------


def keep(seed: int, p: float, *shape: int) -> Tensor:
    return dropout_keep(torch.tensor([seed]), shape, p)  # type: ignore[arg-type]


def test_dropout_hash_has_these_bits() -> None:
    """The specification in words, in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    B, H, T, S, p, seed = 2, 3, 4, 50, 0.3, -(2**45) + 12345
    low, high = seed % 2**32, seed // 2**32 % 2**32
    kept = keep(seed, p, B, H, T, S)
    for row in range(B * H * T):
        key = mix(mix(row ^ mix(low)) ^ mix(high ^ 0x9E3779B9))
        wanted = [mix(key ^ s * 0x9E3779B1 % 2**32) >= int(p * 2**32) for s in range(S)]
        assert kept.flatten(0, 2)[row].tolist() == wanted


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_rate(p: float) -> None:
    """Over all, in every row, at every position and for consecutive seeds: within 5 standard deviations."""
    shape = (4, 4, 64, 64)
    for seed in range(4):
        dropped = (~keep(seed, p, *shape)).double()
        deviation = (p * (1 - p)) ** 0.5
        assert abs(dropped.mean() - p) < 5 * deviation / dropped.numel() ** 0.5
        for part in (dropped.mean(-1), dropped.flatten(0, 2).mean(0)):
            count = dropped.numel() / part.numel()
            assert (part - p).abs().max() < 5 * deviation / count**0.5


def test_dropout_masks_of_rows_heads_positions_and_seeds_are_independent() -> None:
    """Two of them agree as often as chance has it: the standard deviation of an agreement is 1/2 at p = 1/2."""
    mask = keep(0, 0.5, 4, 4, 32, 256)
    pairs = {
        "batch rows": (mask[0], mask[1]),
        "heads": (mask[:, 0], mask[:, 1]),
        "queries": (mask[:, :, :-1], mask[:, :, 1:]),
        "keys": (mask[..., :-1], mask[..., 1:]),
        "diagonals": (mask[:, :, :-1, :-1], mask[:, :, 1:, 1:]),
        "seeds": (mask, keep(1, 0.5, 4, 4, 32, 256)),
        "high halves of seeds": (mask, keep(2**32, 0.5, 4, 4, 32, 256)),
    }
    for name, (a, b) in pairs.items():
        agreement = (a == b).double()
        assert abs(agreement.mean() - 0.5) < 5 * 0.5 / agreement.numel() ** 0.5, name


def test_same_seed_same_mask() -> None:
    case = make_case(S=9)
    first = run(case, dropout_p=0.5, dropout_seed=4)
    assert torch.equal(first, run(case, dropout_p=0.5, dropout_seed=torch.tensor([4])))
    assert not torch.equal(first, run(case, dropout_p=0.5, dropout_seed=5))
    torch.manual_seed(7)
    drawn = run(case, dropout_p=0.5)
    assert not torch.equal(drawn, run(case, dropout_p=0.5))
    torch.manual_seed(7)
    assert torch.equal(drawn, run(case, dropout_p=0.5))


def test_dropout_keeps_the_expectation_and_the_log_sum_exps() -> None:
    case = make_case(missing="all", B=1, H=2, G=1, T=4, S=4, D=4, rings=1)
    whole, whole_lse, _ = run(case, return_lse=True)
    runs = []
    for seed in range(2000):
        out, lse, _ = run(case, dropout_p=0.3, dropout_seed=seed, return_lse=True)
        assert torch.equal(lse, whole_lse)
        runs.append(out)
    outs = torch.stack(runs)
    assert ((outs.mean(0) - whole).abs() <= 5 * outs.std(0) / 2000**0.5 + 1e-12).all()


def test_dropout_spares_memory() -> None:
    case = make_case("gated", missing="none")
    opened = replace(case, gate=torch.full_like(case.gate, torch.inf))  # type: ignore[arg-type]
    assert torch.equal(run(opened), run(opened, dropout_p=0.9, dropout_seed=0))


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"alibi": True}], ids=lambda options: "-".join(options) or "plain"
)
def test_left_padding_equals_the_shorter_call(fusion: str, options: dict[str, Any]) -> None:
    """Hidden keys on the left shift no position: relative ones are all that counts."""
    case = make_case(fusion, S=9, T=5, **options)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :3] = False
    case.key[:, :, :3], case.value[:, :, :3] = 1e3, 1e3
    shorter = replace(case, key=case.key[:, :, 3:], value=case.value[:, :, 3:])
    for got, wanted in zip(run(case, key_mask=mask, **dict(EVERYTHING)), run(shorter, **dict(EVERYTHING)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def test_hidden_keys_may_lie_anywhere() -> None:
    case = make_case(missing="all", S=6, T=1, causal=False)
    mask = torch.tensor([[True, False, True, True, False, True]] * 2)
    wanted = local_attention(replace(case, key=case.key[:, :, mask[0]], value=case.value[:, :, mask[0]]))
    torch.testing.assert_close(run(case, key_mask=mask), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_query_that_sees_no_local_key(fusion: str) -> None:
    case = make_case(fusion, missing="none", T=3, S=3)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    out, local_lse, _, share = run(case, key_mask=mask, **dict(EVERYTHING))
    assert (local_lse == -torch.inf).all()
    memory = run(replace(case, gate=torch.full((4,), torch.inf)) if fusion == "gated" else case, key_mask=mask)
    weight = torch.sigmoid(case.gate.double())[:, None, None] if case.gate is not None else 1.0
    torch.testing.assert_close(out, weight * memory, rtol=0, atol=1e-14)
    assert fusion == "gated" or (share == 1).all()
    case.chunk_ids.fill_(-1)
    out, _, _, share = run(case, key_mask=mask, **dict(EVERYTHING))
    assert (out == 0).all() and (share == 0).all()


# --- float8 memory and autocast ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_float8_memory_is_its_numbers_times_their_scales(fusion: str) -> None:
    case = make_case(fusion, dtype=torch.float32, rings=3, ring_index=True)
    scale = torch.rand(3, 2, 7, 2) + 0.5
    stored = [(bank * 100).to(torch.float8_e4m3fn) for bank in (case.memory_key, case.memory_value)]
    exact = [bank.float() * scale[..., part, None, None] / 100 for part, bank in enumerate(stored)]
    wanted = replace(case, memory_key=exact[0], memory_value=exact[1])
    got = run(replace(case, memory_key=stored[0], memory_value=stored[1]), memory_scale=scale / 100)
    torch.testing.assert_close(got, run(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_a_nan_scale_makes_nan_of_those_who_read_the_chunk(part: int) -> None:
    case = make_case(dtype=torch.float32, missing="none")
    scale = torch.ones(2, 2, 7, 2)
    scale[1, 0, 2, part] = torch.nan
    stored = {name: getattr(case, name).to(torch.float8_e4m3fn) for name in ("memory_key", "memory_value")}
    out = run(replace(case, **stored), memory_scale=scale)
    reads = (case.chunk_ids == 2).any(-1)
    reads[0], reads[:, 2:] = False, False  # another row's ring, other heads
    assert reads.any() and out[reads].isnan().all() and out[~reads].isfinite().all()


def test_autocast_casts_what_attention_of_pytorch_casts() -> None:
    case = make_case(dtype=torch.float32, memory_query=True)
    cast = {name: getattr(case, name).bfloat16() for name in ("query", "key", "value", "memory_query")}
    wanted = replace(case, **cast).run()
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run()
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert case.run().dtype == torch.float32


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.5, "dropout_seed": 2**63}, "dropout_seed must fit into 64 bits"),
        (
            {"dropout_p": 0.5, "dropout_seed": torch.zeros(2, dtype=torch.int64)},
            r"dropout_seed must be .* got .*\(2,\)",
        ),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, "key_mask .* S = 5"),
        ({"memory_scale": torch.ones(2, 2, 7, 2)}, "takes no memory_scale"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_case(), **options)


def test_key_mask_must_be_bool() -> None:
    with pytest.raises(TypeError, match="key_mask must be one of bool"):
        run(make_case(), key_mask=torch.ones(2, 5))


def test_float8_needs_its_scale() -> None:
    case = make_case(dtype=torch.float32)
    bank = case.memory_key.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="needs memory_scale"):
        memory_attention(case.query, case.key, case.value, bank, bank, case.chunk_ids, gate=case.gate)
