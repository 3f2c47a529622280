"""What a query does not see changes nothing, be it NaN or infinite; what it sees does. One suite, per implementation.

Who sees what is written down here once more, so that it is not asked of what is tested.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from memory_attention_cases import OUTPUTS, Case, Inputs, make
from torch import Tensor

CASES = {
    "causal": Case(T=33, S=40, loss=OUTPUTS, own_memory_query=False),
    "window": Case(T=40, S=70, options=(("window", 9),), fusion="joint", loss=OUTPUTS, H=4, G=2, slopes=True),
    "not_causal": Case(T=17, S=20, options=(("causal", False),), key_mask="holes", fusion="joint"),
    "left_padding": Case(T=20, S=40, key_mask="left", loss=OUTPUTS),
    "holes": Case(
        T=33, S=70, key_mask="holes", fusion="joint", D=80, options=(("dropout_p", 0.3), ("dropout_seed", 1))
    ),
    "decode": Case(T=1, S=70, key_mask="holes", loss=OUTPUTS, H=4, G=2),
    "decode_window": Case(T=1, S=300, options=(("window", 20),), fusion="joint"),
    "few": Case(T=5, S=30, fusion="joint", key_mask="holes", loss=OUTPUTS, H=4, G=2),
}


def visible(case: Case, inputs: Inputs) -> Tensor:
    """[B, T, S]."""
    options = inputs.options
    distance = torch.arange(case.S - case.T, case.S)[:, None] - torch.arange(case.S)
    seen = torch.ones(case.B, case.T, case.S, dtype=torch.bool)
    if options.get("causal", True):
        seen &= distance >= 0
    if "window" in options:
        seen &= distance < options["window"]
    return seen & options["key_mask"].cpu()[:, None] if "key_mask" in options else seen


def same(got: Tensor, want: Tensor, name: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def check_unseen(name: str, impl: str, device: str) -> None:
    """All that one query does not see becomes NaN or infinite: its results and gradients stay as they were."""
    case = CASES[name]
    inputs = make(case, device)
    seen = visible(case, inputs).to(device)
    want = inputs.run(impl)
    for b, t in ((0, 0), (case.B - 1, case.T // 2), (0, case.T - 1)):
        poisoned = make(case, device)
        hidden = ~seen[b, t]
        others = torch.arange(case.T, device=device) != t
        leaves = poisoned.leaves
        leaves["key"][b, :, hidden], leaves["value"][b, :, hidden] = math.nan, math.inf
        for query in {"query", "memory_query"} & set(leaves):
            leaves[query][b, :, others] = math.nan
        poisoned.grads["out"][b, :, others] = math.nan
        for g in range(case.G):
            heads = slice(g * case.H // case.G, (g + 1) * case.H // case.G)
            unread = torch.ones(case.M, dtype=torch.bool, device=device)
            unread[[i for i in poisoned.ids[b, heads, t].flatten().tolist() if i >= 0]] = False
            ring = b  # CASES have a ring per row
            poisoned.memory[0][ring, g, unread], poisoned.memory[1][ring, g, unread] = math.nan, -math.inf
        got = poisoned.run(impl)
        for output in (*OUTPUTS, "query", "memory_query"):
            if output in got:
                same(got[output][b, :, t], want[output][b, :, t], f"{output} {b} {t}")
        other_rows = torch.arange(case.B) != b
        for gradient in ("key", "value"):
            same(got[gradient][other_rows], want[gradient][other_rows], gradient)


def check_seen_by_none(name: str, impl: str, device: str) -> None:
    """Keys that no query sees: nothing changes at all, and their gradients are zero."""
    case = CASES[name]
    inputs, poisoned = make(case, device), make(case, device)
    hidden = ~visible(case, inputs).any(1)[:, None, :, None].to(device)
    assert hidden.any()
    for leaf, number in (("key", math.inf), ("value", math.nan)):
        poisoned.leaves[leaf] = torch.where(hidden, number, poisoned.leaves[leaf])
    want, got = inputs.run(impl), poisoned.run(impl)
    for output, value in want.items():
        same(got[output], value, output)
    assert all(got[leaf].masked_select(hidden).count_nonzero() == 0 for leaf in ("key", "value"))


def check_seen(name: str, number: float, impl: str, device: str) -> None:
    """A value that is not finite shows exactly where it is seen, and so does a query in its own row.

    Which gradients are not finite is as in the reference.
    """
    case = replace(CASES[name], own_memory_query=True)
    for argument in ("value", "query", "bank"):
        inputs = make(case, device)
        seen = visible(case, inputs)
        if argument == "value":
            at = int(seen[0].nonzero()[:, 1].median())
            inputs.leaves["value"][0, :, at, 3] = number
            want = torch.zeros(case.B, case.T, dtype=torch.bool)
            want[0] = seen[0, :, at]
            want = want[:, None].expand(-1, case.H, -1)
        elif argument == "query":
            inputs.leaves["query"][0, 0, case.T // 2, 1] = number
            want = torch.zeros(case.B, case.H, case.T, dtype=torch.bool)
            want[0, 0, case.T // 2] = seen[0, case.T // 2].any()
        else:
            inputs.memory[1][:, :, 2, 0, 5] = number
            want = (inputs.ids == 2).any(-1).cpu()
        found, reference = inputs.run(impl), inputs.run("reference")
        assert torch.equal(~found["out"].isfinite().all(-1).cpu(), want), argument
        if "dropout_p" in inputs.options:
            continue  # a dropped weight of a query that is NaN may be NaN or 0
        for output, value in reference.items():
            assert torch.equal(found[output].isfinite(), value.isfinite()), (argument, output)
            same(*(x.nan_to_num(0, 0, 0) for x in (found[output], value)), f"{argument} {output}")


class HiddenNumbersSuite:
    """Subclasses name the implementation and the device."""

    impl: str
    device: str

    @pytest.mark.parametrize("name", CASES)
    def test_what_a_query_does_not_see_changes_nothing(self, name: str) -> None:
        check_unseen(name, self.impl, self.device)

    @pytest.mark.parametrize("name", ["not_causal", "left_padding", "decode", "decode_window", "few"])
    def test_what_no_query_sees_changes_nothing(self, name: str) -> None:
        check_seen_by_none(name, self.impl, self.device)

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", CASES)
    def test_what_is_not_finite_shows_where_it_is_seen(self, name: str, number: float) -> None:
        check_seen(name, number, self.impl, self.device)
