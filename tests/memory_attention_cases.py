"""Inputs that memory_attention kernels are tested with: chosen cases, and random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from longmem_kernels import memory_attention

FP8 = torch.float8_e4m3fn
OUTPUTS = ("out", "local_lse", "memory_lse", "memory_share")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; the defaults are what the other cases vary."""

    B: int = 2
    T: int = 5
    S: int = 5
    H: int = 2
    G: int = 1
    R: int = 2
    M: int = 9
    C: int = 4
    K: int = 3
    D: int = 32
    fusion: str = "gated"
    options: tuple[tuple[str, Any], ...] = ()
    slopes: bool = False
    own_memory_query: bool = True
    ring_index: tuple[int, ...] | None = None
    key_mask: str | None = None  # "left": padding of different lengths; "holes"; "row": all keys of the first row too
    loss: tuple[str, ...] = ("out",)  # the outputs that gradients come from
    dtype: torch.dtype = torch.float32
    bank_dtype: torch.dtype | None = None


CASES = {
    "gated": Case(T=17, S=17),
    "joint": Case(T=17, S=17, fusion="joint"),
    "joint_alibi_window": Case(fusion="joint", slopes=True, options=(("window", 5),), T=33, S=70),
    "gated_alibi_gqa": Case(slopes=True, H=4, G=2),
    "window_1": Case(options=(("window", 1),)),
    "not_causal": Case(options=(("causal", False),), S=40),
    "scale": Case(options=(("scale", 0.5),), fusion="joint"),
    "one_query": Case(T=1, S=70, fusion="joint"),
    "several_blocks": Case(B=1, R=1, T=65, S=70, H=2, G=1),
    "one_token_chunks": Case(C=1, K=5),
    "three_token_chunks": Case(C=3, K=7, T=17, S=17, fusion="joint"),
    "long_chunks": Case(C=64, K=2, T=3, S=3),
    "one_chunk_of_one_token": Case(C=1, K=1),
    "same_memory_query": Case(own_memory_query=False),
    "shared_ring": Case(R=1, B=3, T=3, S=3),
    "ring_index": Case(R=4, ring_index=(2, 0), fusion="joint"),
    "head_dim_80": Case(D=80, S=9),
    "head_dim_256": Case(D=256, S=9, fusion="joint"),
    "bf16_bank": Case(bank_dtype=torch.bfloat16),
    "left_padding": Case(key_mask="left", T=17, S=40, B=3, R=3),
    "masked_holes": Case(key_mask="holes", fusion="joint", slopes=True, options=(("window", 9),), T=33, S=70),
    "row_without_keys": Case(key_mask="row", fusion="joint", loss=OUTPUTS),
    "row_without_keys_gated": Case(key_mask="row", loss=("out", "local_lse")),
    "dropout": Case(options=(("dropout_p", 0.3), ("dropout_seed", 7)), T=17, S=40, H=4, G=2),
    "dropout_joint": Case(
        options=(("dropout_p", 0.5), ("dropout_seed", -(2**40) - 3)), fusion="joint", loss=OUTPUTS, key_mask="holes"
    ),
    "fp8_bank": Case(bank_dtype=FP8, C=3, K=5),
    "fp8_bank_joint": Case(bank_dtype=FP8, fusion="joint", T=17, S=17, loss=OUTPUTS),
    "no_local_keys": Case(S=0, T=17, fusion="joint", loss=("out", "memory_lse"), H=4, G=2),
    "no_local_keys_gated": Case(S=0, T=1, loss=OUTPUTS),
    "all_outputs": Case(loss=OUTPUTS, T=17, S=17, slopes=True, own_memory_query=False),
    "local_lse": Case(loss=("local_lse",)),
    "memory_lse": Case(loss=("memory_lse",), fusion="joint"),
    "memory_share": Case(loss=("memory_share",)),
    "memory_share_joint": Case(loss=("memory_share",), fusion="joint", T=17, S=17),
    "out_and_share": Case(loss=("out", "memory_share"), fusion="joint"),
}
# Sizes at which a kernel works on many blocks at once.
LARGE_CASES = {
    "training": Case(B=4, T=1024, S=1024, H=16, G=16, R=4, M=4096, K=16, D=64, slopes=True),
    "long_window": Case(B=1, T=129, S=2049, H=8, G=2, R=1, M=1000, K=33, D=128, options=(("window", 700),)),
    "decode": Case(B=8, T=1, S=4097, H=16, G=4, R=8, M=16384, K=64, D=128, fusion="joint"),
}


@dataclass
class Inputs:
    leaves: dict[str, Tensor]
    memory: tuple[Tensor, Tensor]
    ids: Tensor
    grads: dict[str, Tensor]  # by output
    options: dict[str, Any]

    def run(self, impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs that have a gradient, and gradients; with `dtype`, of the same numbers in that dtype."""
        # clone(preserve_format) keeps the strides
        leaves = {
            name: leaf.detach().to(dtype or leaf.dtype).clone().requires_grad_() for name, leaf in self.leaves.items()
        }
        outputs = self.attend(leaves, impl, dtype)
        total = sum((outputs[name] * grad.to(outputs[name].dtype)).sum() for name, grad in self.grads.items())
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        found = {name: outputs[name].detach() for name in self.grads}
        return {**found, **dict(zip(leaves, gradients, strict=True))}

    def attend(self, leaves: dict[str, Tensor], impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All outputs, a log-sum-exp of nothing replaced by 0: -inf times a gradient would be NaN."""
        key, value = (bank if bank.dtype == FP8 else bank.to(dtype or bank.dtype) for bank in self.memory)
        optional = {name: leaves[name] for name in ("memory_query", "gate") if name in leaves}
        found = memory_attention(
            leaves["query"], leaves["key"], leaves["value"], key, value, self.ids, **optional, **self.options,
            return_lse=True, return_memory_share=True, impl=impl,
        )  # fmt: skip
        return {
            name: torch.where(x == -torch.inf, 0.0, x) if name.endswith("lse") else x
            for name, x in zip(OUTPUTS, found, strict=True)
        }


def make(case: Case, device: str) -> Inputs:
    """Random inputs in awkward strides. Slots and rings that no id names hold NaN; some ids, and whole rows, are -1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def heads_inside(heads: int, tokens: int) -> Tensor:
        return normal(case.B, tokens, heads, case.D).to(case.dtype).transpose(1, 2)

    store = normal(case.R, case.G, case.M, 2, case.C, case.D)  # as in a Ring
    used = max(1, case.M - 2)
    store[:, :, used:] = math.nan
    rings = torch.tensor(case.ring_index, dtype=torch.int32, device=device) if case.ring_index else None
    if case.ring_index:
        store[[r for r in range(case.R) if r not in case.ring_index]] = math.nan
    ids = torch.randint(-1, used, (case.B, case.T, case.H, case.K), generator=generator)
    ids = ids.int().to(device).transpose(1, 2)
    ids[:1, :, :1] = -1
    ids[-1:, :1, case.T // 2 :: 3] = -1

    leaves = {
        "query": heads_inside(case.H, case.T),
        "key": heads_inside(case.G, case.S),
        "value": heads_inside(case.G, case.S),
    }
    if case.own_memory_query:
        leaves["memory_query"] = heads_inside(case.H, case.T)
    if case.fusion == "gated":
        leaves["gate"] = normal(case.H)
    options = {"fusion": case.fusion, "ring_index": rings, **dict(case.options)}
    if case.slopes:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, case.H + 1, device=device, dtype=torch.float32)
    grads = {"out": heads_inside(case.H, case.T)}
    grads |= {name: normal(case.B, case.T, case.H).transpose(1, 2) for name in OUTPUTS[1:]}
    if case.key_mask:
        options["key_mask"] = key_mask(case, generator).to(device)
    if case.bank_dtype == FP8:
        store, options["memory_scale"] = quantised(store)
    store = store.to(case.bank_dtype or case.dtype)
    return Inputs(
        leaves, (store[:, :, :, 0], store[:, :, :, 1]), ids, {name: grads[name] for name in case.loss}, options
    )


def key_mask(case: Case, generator: torch.Generator) -> Tensor:
    """[B, S], strided. Left padding hides 5, 6, ... keys: more than some queries see."""
    mask = torch.ones(case.S, case.B, dtype=torch.bool).T
    if case.key_mask == "left":
        return mask & (torch.arange(case.S) >= 5 + torch.arange(case.B)[:, None])
    mask = mask & (torch.rand(case.S, case.B, generator=generator) < 0.6).T
    if case.key_mask == "row":
        mask[:1] = False
    return mask


def quantised(store: Tensor) -> tuple[Tensor, Tensor]:
    """A store [R, G, M, 2, C, D] in float8, and its scales [R, G, M, 2], NaN where it is."""
    scale = (store.abs().amax((-1, -2)) / 448).clamp(min=2.0**-126)
    return (store / scale[..., None, None]).to(FP8), scale


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Any sizes and any options together."""
    whole = st.integers
    T = draw(whole(0, 70) | whole(0, 3))
    B, G = draw(whole(1, 3)), draw(whole(1, 3))
    R = draw(st.sampled_from([1, B, 4]))
    rings = st.lists(whole(0, R - 1), min_size=B, max_size=B).map(tuple)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.05, 0.5]))
    if draw(st.booleans()):
        options |= {"dropout_p": draw(st.sampled_from([0.1, 0.7])), "dropout_seed": draw(whole(-(2**63), 2**63 - 1))}
    limit = draw(st.sampled_from(["causal", "window", "none"]))
    if limit != "causal":
        options |= {"window": draw(whole(1, 90))} if limit == "window" else {"causal": False}
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return Case(
        B=B, T=T, S=T + draw(whole(0, 3) | whole(0, 600)), H=G * draw(whole(1, 4)), G=G, R=R, M=draw(whole(1, 40)),
        C=draw(whole(1, 9)), K=draw(whole(1, 9)), D=draw(whole(1, 40) | st.sampled_from([64, 80, 128])),
        fusion=draw(st.sampled_from(["gated", "joint"])), options=tuple(options.items()), slopes=draw(st.booleans()),
        own_memory_query=draw(st.booleans()), ring_index=draw(rings if R not in (1, B) else rings | st.none()),
        key_mask=draw(st.sampled_from([None, "left", "holes", "row"])),
        loss=tuple(draw(st.lists(st.sampled_from(OUTPUTS), min_size=1, unique=True))),
        dtype=draw(st.sampled_from(dtypes)), bank_dtype=draw(st.sampled_from([None, FP8, *dtypes])),
    )  # fmt: skip
