"""Products by oneDNN: the same numbers, by another library, where it was asked for."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from longmem_bench import onednn
from longmem_bench.onednn import onednn_products, why_no_onednn

pytestmark = pytest.mark.skipif(why_no_onednn() is not None, reason=f"no oneDNN: {why_no_onednn()}")
ONEDNN = "mkldnn::_linear_pointwise"


def calls(run: object, *, within: bool) -> int:
    """How many products oneDNN computed in `run`."""
    assert callable(run)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        if within:
            with onednn_products():
                run()
        else:
            run()
    return sum(event.count for event in recorded.key_averages() if event.key == ONEDNN)


def test_forward_and_backward_are_the_same_but_for_rounding() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(192, 160), torch.nn.GELU(), torch.nn.Linear(160, 200, bias=False))
    x = torch.randn(2, 100, 192)
    results = []

    def step() -> None:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out = layer(leaf)
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([out.detach(), leaf.grad, *(g.clone() for g in gradients if g is not None)])

    assert calls(step, within=False) == 0
    assert calls(step, within=True) == 6  # two layers: forward, input and weight gradient
    assert len(results[0]) == 5
    for mine, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_what_it_is_not_meant_for_is_left_alone(dtype: torch.dtype) -> None:
    size = 16 if dtype == torch.float32 else 200
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    assert calls(lambda: left @ right, within=True) == 0
    with onednn_products():
        product = left @ right
    assert torch.equal(product, left @ right)


def test_a_pytorch_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "why_no_onednn", lambda: "built without it")
    with pytest.raises(RuntimeError, match="onednn_products: cannot run: built without it"):
        onednn_products()
