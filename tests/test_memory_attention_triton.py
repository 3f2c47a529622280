"""The Triton memory_attention on a GPU, or under the interpreter (runs are started by test_triton_interpreter.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hidden_numbers import check_seen, check_seen_by_none, check_unseen
from memory_attention_suite import CASES, LARGE_CASES, Case, MemoryAttentionSuite, check
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device: run by test_triton_interpreter.py", allow_module_level=True)

from longmem_kernels import _tiles, memory_attention  # noqa: E402
from longmem_kernels.memory_attention import triton as triton_kernels  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`only(name)`: all calls go to the kernels for few queries ("decode"), or all to the others ("general")."""

    def choose(kernels: str) -> None:
        monkeypatch.setattr(triton_kernels, "few_queries", lambda T: kernels == "decode")

    return choose


class TestTriton(MemoryAttentionSuite):
    impl = "triton"
    device = DEVICE

    @pytest.fixture(autouse=True)
    def general(self, only: Callable[[str], None]) -> Iterator[None]:
        only("general")
        yield


@pytest.mark.parametrize("name", ["window", "holes", "decode", "few"])
def test_what_a_query_does_not_see_changes_nothing(name: str) -> None:
    """Of the kernels for few queries, too: each case runs on those that its queries are for."""
    check_unseen(name, "triton", DEVICE)


def test_what_no_query_sees_changes_nothing() -> None:
    check_seen_by_none("left_padding", "triton", DEVICE)


@pytest.mark.parametrize("name", ["causal", "decode_window"])
def test_what_is_not_finite_shows_where_it_is_seen(name: str) -> None:
    check_seen(name, float("nan"), "triton", DEVICE)


DECODED = ["joint_alibi_window", "gated_alibi_gqa", "not_causal", "one_query", "three_token_chunks", "long_chunks"]
DECODED += ["shared_ring", "ring_index", "head_dim_80", "bf16_bank"]


@pytest.mark.parametrize("name", DECODED)
def test_the_kernels_for_few_queries_do_what_the_others_do(name: str, only: Callable[[str], None]) -> None:
    only("decode")
    check(CASES[name], "triton", DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE_CASES)
def test_large(name: str, dtype: torch.dtype) -> None:
    check(Case(**{**vars(LARGE_CASES[name]), "dtype": dtype}), "triton", "cuda")


# --- options that the suite's cases do not combine ----------------------------------------------------------------

NAMES = ("query", "key", "value", "memory_query", "gate")


def call(
    *,
    B: int = 2,
    H: int = 4,
    G: int = 2,
    T: int = 19,
    S: int = 37,
    D: int = 32,
    M: int = 9,
    C: int = 3,
    K: int = 3,
    fusion: str = "gated",
    dtype: torch.dtype = torch.float32,
    float8: bool = False,
    padding: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of a call. `padding`: a key mask that hides the first keys, of row 0 all that its first query sees."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    store = normal(B, G, M, 2, C, D)
    ids = torch.randint(-1, M - 1, (B, H, T, K), generator=generator, dtype=torch.int32).to(DEVICE)
    ids[0, :, 0] = -1
    ids[-1, 0, 1::3] = -1
    arguments: dict[str, Any] = {
        "query": normal(B, H, T, D).to(dtype),
        "key": normal(B, G, S, D).to(dtype),
        "value": normal(B, G, S, D).to(dtype),
        "memory_query": normal(B, H, T, D).to(dtype),
        "chunk_ids": ids,
        "fusion": fusion,
        **options,
    }
    if fusion == "gated":
        arguments["gate"] = normal(H)
    if float8:
        arguments["memory_scale"] = store.abs().amax((4, 5)) / 448
        store = store / arguments["memory_scale"][..., None, None]
        store[0, 0, 0, 0, 0, :4] = torch.tensor([2.0**-9, -7 * 2.0**-9, 448.0, -448.0])  # subnormal, largest
        store = store.to(torch.float8_e4m3fn)
        arguments["memory_scale"][:, :, M - 1] = torch.nan  # a slot that no id names
    else:
        store[:, :, M - 1] = torch.nan
        store = store.to(dtype)
    arguments["memory_key"], arguments["memory_value"] = store[:, :, :, 0], store[:, :, :, 1]
    if padding:
        mask = torch.ones(B, S, dtype=torch.bool)
        mask[0, : S - T + 1] = False
        mask[-1, : S - T - 2 : 2] = False
        arguments["key_mask"] = mask.to(DEVICE)
    return arguments


def run(arguments: dict[str, Any], impl: str, double: bool = False) -> dict[str, Tensor]:
    """All outputs, and the gradients of a sum over all of them."""
    leaves = {name: arguments[name].detach().clone() for name in NAMES if name in arguments}
    if double:
        leaves = {name: leaf.double() for name, leaf in leaves.items()}
    given = {**arguments, **{name: leaf.requires_grad_() for name, leaf in leaves.items()}}
    if double and given["memory_key"].dtype != torch.float8_e4m3fn:
        given |= {name: given[name].double() for name in ("memory_key", "memory_value")}
    results = memory_attention(**given, return_lse=True, return_memory_share=True, impl=impl)
    named = dict(zip(("out", "local_lse", "memory_lse", "share"), results, strict=True))
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for result in results:
        weights = torch.randn(result.shape, generator=generator).to(DEVICE).to(result.dtype)
        total = total + (torch.where(result.isfinite(), result, 0.0) * weights).double().sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {**{name: result.detach() for name, result in named.items()}, **dict(zip(leaves, gradients, strict=True))}


def compare(arguments: dict[str, Any]) -> None:
    kernel, eager, exact = (
        run(arguments, "triton"),
        run(arguments, "reference"),
        run(arguments, "reference", double=True),
    )
    epsilon = torch.finfo(arguments["query"].dtype).eps
    for name, value in exact.items():
        assert kernel[name].dtype == eager[name].dtype and kernel[name].shape == value.shape, name
        assert torch.equal(kernel[name].isinf(), value.isinf()), name
        finite = value.isfinite()
        error, eager_error = (float((of[name] - value)[finite].abs().max()) for of in (kernel, eager))
        # The kernels round softmax weights and score gradients to 16 bits for their products, the reference does not.
        granted = 2 * epsilon * float(value[finite].abs().max()) + 2**-20
        assert error <= 3 * eager_error + granted, f"{name}: error {error:.3g}, reference {eager_error:.3g}"


OPTIONS: dict[str, dict[str, Any]] = {
    "log-sum-exps": {},
    "joint": {"fusion": "joint"},
    "key mask": {"padding": True},
    "key mask, joint, window": {"padding": True, "fusion": "joint", "window": 7},
    "key mask, not causal": {"padding": True, "causal": False},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5},
    "dropout, joint, ALiBi": {"dropout_p": 0.6, "dropout_seed": -(2**40) - 3, "fusion": "joint", "slopes": True},
    "float8": {"float8": True},
    "float8, joint, wide": {"float8": True, "fusion": "joint", "D": 64, "C": 1, "K": 17, "M": 20},
    "negative scale": {"scale": -0.2, "fusion": "joint"},
    "scale 0": {"scale": 0.0},
    "several blocks, ALiBi": {"T": 70, "S": 150, "B": 1, "H": 2, "G": 1, "slopes": True, "fusion": "joint"},
    "several blocks, window, ALiBi": {"T": 70, "S": 150, "B": 1, "H": 2, "G": 1, "slopes": True, "window": 90},
    "everything": {
        "padding": True,
        "dropout_p": 0.1,
        "dropout_seed": 2**33,
        "float8": True,
        "slopes": True,
        "window": 9,
    },
}


def options_of(name: str, **more: Any) -> dict[str, Any]:
    options = {**OPTIONS[name], **more}
    if options.pop("slopes", False):
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, options.get("H", 4) + 1, device=DEVICE, dtype=torch.float32)
    return options


@pytest.mark.parametrize("kernels", ["general", "decode"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, kernels: str, only: Callable[[str], None]) -> None:
    only(kernels)
    compare(call(**{"T": 19 if kernels == "general" else 2, **options_of(name)}))


@pytest.mark.parametrize("name", ["key mask, joint, window", "dropout, joint, ALiBi", "several blocks, ALiBi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_options_in_16_bits(name: str, dtype: torch.dtype, only: Callable[[str], None]) -> None:
    only("general")
    compare(call(**options_of(name, dtype=dtype)))


def test_all_floats8(only: Callable[[str], None]) -> None:
    """Every number of float8_e4m3fn is read as PyTorch reads it, NaN included."""
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    bank = numbers.view(1, 1, 8, 1, 32)
    ids = torch.arange(8, dtype=torch.int32, device=DEVICE).view(1, 1, 8, 1)
    local = torch.zeros(1, 1, 8, 32, device=DEVICE)
    for kernels in ("general", "decode"):
        only(kernels)
        out = memory_attention(
            local, local, local, torch.zeros_like(bank), bank, ids,
            memory_scale=torch.ones(1, 1, 8, 2, device=DEVICE), gate=torch.full((1,), torch.inf, device=DEVICE),
            impl="triton",
        )  # fmt: skip
        torch.testing.assert_close(out.flatten(), numbers.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_a_nan_scale_makes_nan(part: int, only: Callable[[str], None]) -> None:
    arguments = call(float8=True)
    arguments["memory_scale"][1, 0, 3, part] = torch.nan
    arguments["memory_scale"][:, :, 8] = 1.0
    named = ((arguments["chunk_ids"] == 3).any(-1) & (torch.arange(2, device=DEVICE) == 1)[:, None, None])[:, :2]
    for kernels in ("general", "decode"):
        only(kernels)
        out = memory_attention(**arguments, impl="triton")[:, :2]
        assert named.any() and not named.all()
        assert out[named].isnan().all() and out[~named].isfinite().all()


def test_a_grad_of_the_log_sum_exps_alone() -> None:
    arguments = call()
    for name in ("query", "key", "memory_query"):
        arguments[name].requires_grad_()
    found = []
    for impl in ("triton", "reference"):
        _, local_lse, memory_lse = memory_attention(**arguments, return_lse=True, impl=impl)
        loss = local_lse.square().sum() + torch.where(memory_lse.isfinite(), memory_lse, 0.0).sum()
        found.append(torch.autograd.grad(loss, [arguments[name] for name in ("query", "key", "memory_query")]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_part_rounded_to_nothing_keeps_the_gradient_of_its_log_sum_exp() -> None:
    """sigmoid(40) is 1 in float32: the local part has no weight in the output."""
    arguments = call()
    arguments["gate"].fill_(40.0)
    arguments["query"].requires_grad_()
    found = []
    for impl in ("triton", "reference"):
        out, local_lse, _ = memory_attention(**arguments, return_lse=True, impl=impl)
        found.append(torch.autograd.grad(out.sum() + local_lse.sum(), arguments["query"])[0])
    assert found[1].abs().max() > 0.1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_decode_equals_the_last_row_of_prefill(name: str, only: Callable[[str], None]) -> None:
    if "not causal" in name or "dropout" in OPTIONS[name] or "dropout_p" in OPTIONS[name]:
        pytest.skip("the last row of a longer call sees other keys, or drops other weights")
    arguments = call(**options_of(name))
    only("general")
    whole = memory_attention(**arguments, return_lse=True, impl="triton")
    only("decode")
    last = {name: arguments[name][:, :, -1:] for name in ("query", "memory_query", "chunk_ids")}
    for step, longer in zip(
        memory_attention(**{**arguments, **last}, return_lse=True, impl="triton"), whole, strict=True
    ):
        torch.testing.assert_close(step, longer[:, :, -1:], rtol=1e-5, atol=1e-5)


def test_few_queries_are_decoded() -> None:
    assert triton_kernels.few_queries(1) and triton_kernels.few_queries(16) and not triton_kernels.few_queries(17)


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_any_number_of_parts(programs: int) -> None:
    """Long caches, many tokens, few or many programs to split them for; parts that see no key at all."""
    arguments = call(B=1, H=3, G=1, T=2, S=300, M=60, C=3, K=50, fusion="joint")
    arguments["key_mask"] = torch.ones(1, 300, dtype=torch.bool, device=DEVICE)
    arguments["key_mask"][:, 20:200] = False
    use = {"BT": 16, "BS": 32, "BJ": 64, "programs": programs, "num_warps": 4, "num_stages": 2}
    with _tiles.forced({"memory_attention_decode_kernel": use}), _tiles.noted() as lookups:
        compare(arguments)
    assert [dict(lookup.use)["programs"] for lookup in lookups if "decode" in lookup.kernel] == [programs]


# --- the framework -------------------------------------------------------------------------------------------------


def test_same_mask_as_the_reference_beyond_the_first_block() -> None:
    """Values of one are the dropped weights: equal outputs mean equal masks."""
    arguments = call(B=1, H=2, G=2, T=70, S=70, dropout_p=0.5, dropout_seed=77)
    arguments["chunk_ids"].fill_(-1)
    arguments["value"] = torch.eye(70, 32, device=DEVICE).expand(1, 2, 70, 32).contiguous()
    ours, theirs = (memory_attention(**arguments, impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(ours == 0, theirs == 0)
    assert 0.4 < float((ours[:, :, 40:] == 0).float().mean()) < 0.6


@pytest.mark.parametrize("fusion", ["gated", "joint"])
def test_gradient_checkpointing_changes_nothing(fusion: str) -> None:
    arguments = call(fusion=fusion, H=2, G=1, dropout_p=0.2, dropout_seed=3)
    names = ("query", "key", "value", "memory_query")
    leaves = [arguments[name].requires_grad_() for name in names]

    def attend(*tensors: Tensor) -> Tensor:
        given = {**arguments, **dict(zip(names, tensors, strict=True))}
        out: Tensor = memory_attention(**given, impl="triton")
        return out

    wanted = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    got = torch.autograd.grad(checkpoint(attend, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("T", [3, 19])
@pytest.mark.parametrize("fusion", ["gated", "joint"])
def test_compiles_into_one_graph_forward_and_backward(fusion: str, T: int) -> None:
    arguments = call(fusion=fusion, padding=T == 19, T=T, H=2, G=1, dropout_p=0.2)
    arguments["dropout_seed"] = torch.tensor([3], device=DEVICE)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = {**arguments, "query": query, "key": key, "value": value}
        out, lse, _, share = memory_attention(**given, return_lse=True, return_memory_share=True, impl="triton")
        return (out * share[..., None]).sum() + torch.where(lse == -torch.inf, 0.0, lse).sum()

    compiled = torch.compile(attend, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    wanted, got = (torch.autograd.grad(function(*leaves), leaves) for function in (attend, compiled))
    for ours, eager in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["key mask", "dropout", "float8, joint, wide"])
def test_opcheck(name: str) -> None:
    arguments = call(**options_of(name, B=1, H=2, G=1, T=2, S=4))
    seed = torch.tensor([arguments["dropout_seed"]], device=DEVICE) if "dropout_seed" in arguments else None
    inputs = tuple(arguments[n] for n in ("query", "key", "value", "memory_query", "memory_key", "memory_value"))
    optional = tuple(arguments.get(n) for n in ("memory_scale", "none", "gate", "alibi_slopes", "key_mask"))
    options = (arguments["fusion"], 0.2, True, None, arguments.get("dropout_p", 0.0))
    packed = (*inputs, arguments["chunk_ids"], *optional, seed, *options)
    ops = torch.ops.longmem
    _, *saved = ops.memory_attention_triton(*packed)
    lse_grad = torch.ones_like(saved[1])
    # PyTorch's check of the schema multiplies every input by a number, which it cannot do with float8.
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += [] if "memory_scale" in arguments else ["test_schema"]
    for grads in ((torch.ones_like(arguments["query"]), lse_grad, None), (None, None, lse_grad)):
        torch.library.opcheck(ops.memory_attention_backward_triton, (*grads, *packed, *saved), test_utils=checks)
    for leaf in inputs[:4]:
        leaf.requires_grad_()
    torch.library.opcheck(ops.memory_attention_triton, packed, test_utils=checks)


def test_autocast() -> None:
    arguments = call()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = memory_attention(**arguments, impl="triton")
    names = ("query", "key", "value", "memory_query")
    cast = memory_attention(**{**arguments, **{n: arguments[n].bfloat16() for n in names}}, impl="triton")
    assert out.dtype == torch.bfloat16 and torch.equal(out, cast)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 33])
def test_cuda_graph(T: int) -> None:
    """Captured once, replayed on other numbers: forward and, for a segment, backward too."""
    arguments = call(T=T, S=200, D=64, dtype=torch.bfloat16, padding=T > 1)
    names = ("query", "key", "value", "memory_query")
    leaves = [arguments[name].requires_grad_() for name in names]

    def step() -> list[Tensor]:
        out = memory_attention(**arguments, impl="triton")
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
        arguments["chunk_ids"].copy_(arguments["chunk_ids"].flip(2))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_needs_little_more_memory_than_its_outputs() -> None:
    """What backward keeps and takes besides gradients: far less than one gathered copy of the chunks."""
    B, H, T, D, K, C = 2, 8, 1024, 64, 16, 4
    arguments = call(B=B, H=H, G=H, T=T, S=T, D=D, M=512, C=C, K=K, dtype=torch.bfloat16)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value", "memory_query")]
    torch.autograd.grad(memory_attention(**arguments, impl="triton").sum(), leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(memory_attention(**arguments, impl="triton").sum(), leaves)
    gathered = B * H * T * K * C * D * 2 * 2
    assert torch.cuda.max_memory_allocated() - before < gathered / 4


@pytest.mark.parametrize("T", [1, 20])
def test_ids_and_rings_that_make_no_sense_are_none(T: int) -> None:
    """Called by hand, forward and backward: the public function would refuse them on the CPU."""
    B, H, G, D, R, M, C, K = 3, 4, 2, 32, 2, 5, 3, 4
    query, memory_query = torch.randn(2, B, H, T, D, device=DEVICE)
    key, value = torch.randn(2, B, G, T, D, device=DEVICE)
    bank = torch.randn(R, G, M, C, D, device=DEVICE)
    ids = torch.randint(0, M, (B, H, T, K), dtype=torch.int32, device=DEVICE)
    ids[..., 1] = torch.tensor([M, -2, 2**31 - 1, -(2**31)], device=DEVICE)[:, None]
    index = torch.tensor([1, R, -7], dtype=torch.int32, device=DEVICE)
    sound = torch.where((ids >= 0) & (ids < M) & (index == 1)[:, None, None, None], ids, -1)
    options = ("joint", D**-0.5, True, None, 0.0)
    results = []
    for chunk_ids, ring_index in ((ids, index), (sound, torch.ones_like(index))):
        inputs = (query, key, value, memory_query, bank, bank, chunk_ids, None, ring_index, None, None, None, None)
        out, *saved = torch.ops.longmem.memory_attention_triton(*inputs, *options)
        grads = (torch.ones_like(out), None, None)
        gradients = torch.ops.longmem.memory_attention_backward_triton(*grads, *inputs, *options, *saved)
        results.append((out, *saved, *gradients))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with pytest.raises(ValueError, match="memory_attention: chunk_ids must be"):
        torch.ops.longmem.memory_attention_triton(*inputs[:6], ids.long(), *inputs[7:], *options)
