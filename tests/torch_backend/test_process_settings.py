"""Settings of the process decide nothing: neither precision, nor dtype, nor device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch backend needs PyTorch")

from sparse_dlm_attn import (  # noqa: E402
    AttentionState,
    Backend,
    Context,
    PassInfo,
    PrefixAttention,
    Selection,
    get_backend,
    list_policies,
)
from sparse_dlm_attn.ranked import RankedPass  # noqa: E402
from sparse_dlm_attn_torch import ops  # noqa: E402

POLICIES = (
    *(name for name in list_policies() if name != "losa"),
    "losa:budget=64,active=3",
    "quest:budget=64,pages=own",
    "losa:budget=64,mass=0.5,drift=refresh",
    "mage:budget=64,dense_layers=0",
    "sparsed:warmup=1,span=4",
    "snapkv:capacity=48,window=16",
    "quest:budget=64,group_scores=mean,newest=true",
)
PATHS = ("torch:attention=gather", "torch:attention=masked")


@contextmanager
def default(setter: Callable[[Any], None], value: Any, usual: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(usual)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: default(torch.set_default_device, "meta", None),
    "default dtype float64": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: default(torch.set_default_dtype, torch.bfloat16, torch.float32),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Layer:
    """Two sequences of different lengths, in pages of 16, and the rows of four passes."""

    def __init__(self, dtype: torch.dtype) -> None:
        made = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Any:
            return torch.randn(shape, generator=made).to(dtype)

        self.context = Context.from_dense(*drawn(2, 2, 2, 256, 32), 16, torch.tensor([256, 201]))
        self.k, self.v = drawn(2, 2, 2, 8, 32)
        self.queries = drawn(4, 2, 4, 8, 32)
        self.newly = torch.rand((4, 2, 8), generator=made) < 0.3

    def passes(self, policy: str, backend: str | Backend) -> list[Any]:
        """Return everything that four passes give: outputs, states, decisions, traffic."""
        attention, memory, results = PrefixAttention(policy, backend), None, []
        for index, q in enumerate(self.queries):
            info = PassInfo(index, index == 3, self.newly[:index].any(0), self.newly[index], total_passes=3)
            out, memory = attention(q, self.k, self.v, self.context, memory, info)
            traffic = memory.traffic
            results += [out, memory.state.out, memory.state.lse, memory.selection.mask, memory.active]
            results += [traffic.density, traffic.bytes_read, traffic.pairs]
        return results


def expect_same(got: list[Any], wanted: list[Any]) -> None:
    for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert one.device == other.device and one.dtype == other.dtype, place
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=f"result {place}")


@pytest.mark.clause("PURE-6")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", PATHS)
@both_dtypes
def test_no_setting_changes_a_pass(policy: str, backend: str, dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    wanted = layer.passes(policy, backend)
    for setting in SETTINGS.values():
        with setting():
            expect_same(layer.passes(policy, backend), wanted)


class Default(Backend):
    """What a backend inherits, beside operators that multiply as their author wrote them."""

    name = "default"
    inner = get_backend("torch")
    capabilities = inner.capabilities  # type: ignore[assignment]
    asarray, page_bounds, attend_pages = inner.asarray, inner.page_bounds, inner.attend_pages  # type: ignore[assignment]

    def page_scores(self, q: Any, bounds: Any, *, active: Any = None) -> Any:
        batch, heads, pages, channels = bounds.lower.shape
        rows = q.float().view(batch, heads, -1, channels)
        scores = rows.clamp(min=0) @ bounds.upper.float().mT + rows.clamp(max=0) @ bounds.lower.float().mT
        return scores.view(*q.shape[:3], pages)

    def attend_block(self, q: Any, k: Any, v: Any, *, scale: float | None = None) -> AttentionState:
        group = q.shape[1] // k.shape[1]
        logits = q.float() @ k.float().repeat_interleave(group, 1).mT * (scale or q.shape[3] ** -0.5)
        out = logits.softmax(-1) @ v.float().repeat_interleave(group, 1)
        return AttentionState(out.to(q.dtype), logits.logsumexp(-1))


def results_of_operators(layer: Layer, ops: Backend) -> list[Any]:
    """Call every operator of a backend itself, without the driver."""
    q, other, k, v, context = *layer.queries[:2], layer.k, layer.v, layer.context
    bounds = ops.page_bounds(context)
    active = torch.arange(8, device="cpu").expand(2, 8) % 2 == 0
    scores = ops.page_scores(q, bounds)
    mask = ops.top_pages(scores, 3, eligible=context.exists[:, None, None, :])
    selection, state = Selection(mask, 1), ops.attend_block(q, k, v)
    change = ops.query_change(q, other)
    rule = RankedPass(64, 3, reference=other, count=3, keep="queries")
    ranked = ops.attend_ranked(q, k, v, context, bounds, rule, state)
    pages = ops.attend_pages(q, context, selection, active)
    states = [state, pages, ops.merge(state, pages), ops.reuse(active, state, pages), ranked.state]
    grown = ops.extend_bounds(context, bounds, 3)
    return [
        bounds.lower,
        bounds.upper,
        grown.lower,
        grown.upper,
        scores,
        mask,
        change,
        ops.largest_changes(change, count=2),
        ops.largest_changes(change, mass=0.5),
        ops.pooled_scores(q, context, span=4),
        ops.pooled_scores(q, context, span=4, lse=pages.lse),
        ops.attend(q, k, v, context, selection, active, state)[0],
        ranked.out,
        ranked.active,
        ranked.selection.mask,
        ranked.kept,
        *(part for each in states for part in (each.out, each.lse)),
    ]


@pytest.mark.clause("PURE-6")
@every_setting
@pytest.mark.parametrize("backend", [*PATHS, Default()], ids=[*PATHS, "defaults"])
@both_dtypes
def test_no_setting_changes_an_operator(setting: str, backend: str | Backend, dtype: torch.dtype) -> None:
    layer, chosen = Layer(dtype), get_backend(backend)
    wanted = results_of_operators(layer, chosen)
    with SETTINGS[setting]():
        expect_same(results_of_operators(layer, chosen), wanted)


@pytest.mark.clause("PURE-6")
@every_setting
@both_dtypes
def test_no_setting_changes_a_custom_operator(setting: str, dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    q, k, v, c = layer.queries[0], layer.k, layer.v, layer.context
    pages = (c.k_pages, c.v_pages, c.page_table, c.page_lengths)
    bounds, rows = ops.page_bounds(*pages[:1], *pages[2:]), torch.ones(2, 8, dtype=torch.bool)
    chosen = (*pages, c.exists[:, None, None, :].clone(), 8, rows, 0.25)

    def run() -> list[Any]:
        return [
            *ops.attend_pages.opaque(q, *chosen, "gather"),
            *ops.attend_pages(q, *chosen, "masked"),
            *ops.attend(q, k, v, *chosen, "gather", "matmul", None, None),
            *ops.attend_block(q, k, v, 0.25, "matmul"),
            ops.page_scores(q, *bounds),
            ops.pooled_scores(q, pages[0], *pages[2:], 4, 0.25),
        ]

    wanted = run()
    with SETTINGS[setting]():
        expect_same(run(), wanted)


@pytest.mark.clause("PURE-6")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")  # array-api-compat caches a look-up
def test_autocast_around_a_compiled_layer_changes_nothing() -> None:
    torch._dynamo.reset()
    layer, backend = Layer(torch.bfloat16), get_backend("torch")
    wanted = layer.passes("mage:budget=64,dense_layers=0", backend)
    attention, memory, got = PrefixAttention("mage:budget=64,dense_layers=0", backend), None, []
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for index, q in enumerate(layer.queries[:2]):
            info = PassInfo(index, total_passes=3)
            out, memory = compiled(q, layer.k, layer.v, layer.context, memory, info)
            got += [out, memory.selection.mask]
    expect_same(got, [wanted[place] for place in (0, 3, 8, 11)])


@pytest.mark.clause("PURE-6")
@every_setting
def test_values_of_the_host_become_the_same_tensors(setting: str) -> None:
    backend = get_backend("torch")
    given = ([0.1, 0.2], 0.3, [1, 2], [True], torch.tensor([0.5]), torch.tensor([0.5]).numpy())
    wanted = [backend.asarray(values) for values in given]
    with SETTINGS[setting]():
        expect_same([backend.asarray(values) for values in given], wanted)
