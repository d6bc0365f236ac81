"""Where PyTorch would record gradients a call refuses; where it does not, no pass keeps another alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch backend needs PyTorch")

from sparse_dlm_attn import (  # noqa: E402
    AttentionState,
    Context,
    Decoder,
    InvalidArgumentError,
    PageBounds,
    PassInfo,
    PrefixAttention,
    Selection,
    get_backend,
)

POLICIES = (
    "dense",
    "losa:budget=32,active=2",
    "quest:budget=32",
    "mage:budget=32,dense_layers=0",
    "sparsed:warmup=1",
    "flashblock",
    "snapkv:capacity=48,window=16",
)
NO_RECORD = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


def problem() -> dict[str, Any]:
    torch.manual_seed(0)
    rows = {name: torch.randn(1, heads, 8, 32) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return {**rows, "context": Context.from_dense(*torch.randn(2, 1, 2, 128, 32), 16)}


def recorded(name: str) -> dict[str, Any]:
    """Return a problem of which one array requires a gradient."""
    given = problem()
    if name in given:
        return {**given, name: given[name].requires_grad_()}
    if name == "bounds":
        made = get_backend("torch").page_bounds(given["context"])
        bounds = PageBounds(made.lower.requires_grad_(), made.upper)
        return {**given, "context": given["context"].with_bounds(bounds)}
    pages = getattr(given["context"], name).clone().requires_grad_()
    return {**given, "context": replace(given["context"], **{name: pages})}


@pytest.mark.clause("ERROR-1", "DRIVER-1")
@pytest.mark.parametrize("name", ["q", "k", "v", "k_pages", "v_pages", "bounds"])
@pytest.mark.parametrize("backend", ["torch", "torch:attention=masked"])
def test_an_argument_that_requires_a_gradient_is_refused_where_one_is_recorded(name: str, backend: str) -> None:
    given, attention = recorded(name), PrefixAttention("losa:budget=32,active=2", backend)
    with pytest.raises(InvalidArgumentError, match=rf"{name} must not require a gradient.*no_grad\(\)"):
        attention(**given)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, memory = attention(**given)
        kept = [out, memory.state.out, memory.state.lse, memory.policy_memory.reference]
        assert not any(tensor.requires_grad for tensor in kept)


def test_results_of_a_layer_are_refused_and_computed_under_no_grad() -> None:
    weight, given = torch.randn(32, 32, requires_grad=True), problem()
    attention = PrefixAttention("dense", "torch")
    with pytest.raises(InvalidArgumentError, match="q must not require a gradient"):
        attention(given["q"] @ weight, given["k"], given["v"], given["context"])
    with torch.no_grad():
        attention(given["q"] @ weight, given["k"], given["v"], given["context"])


def operators(given: dict[str, Any], wrong: Any) -> dict[str, Callable[[Any], Any]]:
    """Return a call of each operator, one float argument of which requires a gradient."""
    q, k, v, context = given["q"], given["k"], given["v"], given["context"]
    rows = torch.ones(1, 8, dtype=torch.bool)
    chosen, lse = Selection.all_pages(context, 8), torch.zeros(1, 4, 8)
    state, bad = AttentionState(q, lse), AttentionState(wrong, lse)
    pages = replace(context, k_pages=context.k_pages.clone().requires_grad_())
    return {
        "page_bounds": lambda ops: ops.page_bounds(pages),
        "page_scores": lambda ops: ops.page_scores(wrong, ops.page_bounds(context)),
        "pooled_scores": lambda ops: ops.pooled_scores(q, pages, span=4),
        "top_pages": lambda ops: ops.top_pages(wrong, 2, eligible=wrong > 0),
        "query_change": lambda ops: ops.query_change(q, wrong),
        "largest_changes": lambda ops: ops.largest_changes(wrong[0, 0], count=2),
        "attend_pages": lambda ops: ops.attend_pages(wrong, context, chosen, rows),
        "attend_block": lambda ops: ops.attend_block(wrong, k, v),
        "merge": lambda ops: ops.merge(state, bad),
        "reuse": lambda ops: ops.reuse(rows, state, bad),
        "attend": lambda ops: ops.attend(q, k, v, context, chosen, rows, bad),
    }


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("name", operators(problem(), torch.zeros(1, 4, 8, 32)))
def test_an_operator_called_by_itself_refuses_it_too(name: str) -> None:
    given = problem()
    call = operators(given, torch.randn(1, 4, 8, 32, requires_grad=True))[name]
    with pytest.raises(InvalidArgumentError, match=r"must not require a gradient.*torch\.no_grad\(\)"):
        call(get_backend("torch"))
    with torch.no_grad():
        call(get_backend("torch"))


@NO_RECORD
@pytest.mark.parametrize("policy", POLICIES)
def test_no_pass_keeps_an_earlier_one_alive(policy: str, mode: Any) -> None:
    weight, given = torch.randn(32, 32, requires_grad=True), problem()
    decoder = Decoder(policy, "torch", layers=1)
    decoder.start_block([given["context"]])
    alive, decoded = [], torch.zeros(1, 8, dtype=torch.bool)
    with mode():
        for _ in range(4):
            hidden = torch.randn(1, 4, 8, 32)
            alive.append(weakref.ref(hidden))
            decoder.next_pass(decoded)(0, hidden @ weight, given["k"], given["v"])
            del hidden
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "modes",
    [
        (torch.inference_mode, torch.enable_grad),
        (torch.enable_grad, torch.inference_mode),
        (torch.no_grad, torch.inference_mode),
        (torch.inference_mode, torch.no_grad),
    ],
    ids=lambda modes: " then ".join(mode.__name__ for mode in modes),
)
def test_memory_of_one_mode_serves_in_another(policy: str, modes: tuple[Any, Any]) -> None:
    given, flags = problem(), torch.zeros(1, 8, dtype=torch.bool)
    results: list[list[Any]] = [[], []]
    for place, chosen in enumerate((modes, (torch.no_grad, torch.no_grad))):
        attention, memory = PrefixAttention(policy, "torch"), None
        for index in range(4):
            with chosen[index % 2]():
                info = PassInfo(index % 3, newly_decoded=flags)  # the last pass begins another block
                out, memory = attention(**given, memory=memory, info=info)
                memory = memory.reorder([0])
                results[place] += [out, memory.state.lse, memory.traffic.density]
        for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
            results[place].append(attention(**given, memory=twin, info=PassInfo(1, newly_decoded=flags))[0])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
