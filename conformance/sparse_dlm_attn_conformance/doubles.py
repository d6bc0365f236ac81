"""Stand-ins that laws put around the backend or policy under test: they watch, or make ties exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

from sparse_dlm_attn import AttentionState, Backend, Context, PassInfo, PassInputs, PrefixAttentionPolicy, Selection
from sparse_dlm_attn.arrays import Array, to_numpy
from sparse_dlm_attn.capabilities import Capabilities, Problem
from sparse_dlm_attn_reference import ReferenceBackend

GRID = 1024.0


def forwarded(operator: str) -> Any:
    """Return a method that hands an operator on."""

    def method(self: Delegate, *arguments: Any, **options: Any) -> Any:
        return self.call(operator, *arguments, **options)

    return method


class Delegate(Backend):
    """A backend that hands every call on."""

    name: ClassVar[str] = "delegate"
    page_bounds = forwarded("page_bounds")
    page_scores = forwarded("page_scores")
    pooled_scores = forwarded("pooled_scores")
    top_pages = forwarded("top_pages")
    query_change = forwarded("query_change")
    largest_changes = forwarded("largest_changes")
    attend_pages = forwarded("attend_pages")
    attend_block = forwarded("attend_block")
    merge = forwarded("merge")
    reuse = forwarded("reuse")
    attend = forwarded("attend")

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def why_not(self, problem: Problem) -> list[str]:
        return self.inner.why_not(problem)

    def asarray(self, values: Any, *, dtype: str | None = None) -> Array:
        return self.inner.asarray(values, dtype=dtype)

    def call(self, operator: str, *arguments: Any, **options: Any) -> Any:
        """Run an operator of the inner backend."""
        return getattr(self.inner, operator)(*arguments, **options)


class Watched(Delegate):
    """A backend that keeps a list of the operators it was asked for, and may refuse problems."""

    name: ClassVar[str] = "watched"

    def __init__(self, inner: Backend, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(inner)
        self.calls: list[str] = []
        self.reasons = reasons

    def why_not(self, problem: Problem) -> list[str]:
        return list(self.reasons) or self.inner.why_not(problem)

    def call(self, operator: str, *arguments: Any, **options: Any) -> Any:
        """Note the operator, then run it."""
        self.calls.append(operator)
        return super().call(operator, *arguments, **options)


class Ranking(Watched):
    """A watched backend that takes ranked passes as one operator, whether or not the inner one fuses them."""

    name: ClassVar[str] = "ranking"
    attend_ranked = forwarded("attend_ranked")


class Grid(Delegate):
    """A backend whose pooled scores are the reference's, rounded to a grid.

    Softmax masses differ in their last bits from backend to backend. On a grid their sums are exact,
    so that policies which rank masses have to decide alike on every backend too.
    """

    name: ClassVar[str] = "grid"

    def pooled_scores(
        self, q: Array, context: Context, *, span: int, scale: float | None = None, lse: Array | None = None
    ) -> Array:
        """Return the reference's scores on the grid; with ``lse``, shares of what that covers, all of it."""
        queries, k_pages, v_pages = (
            to_numpy(part).astype(np.float64) for part in (q, context.k_pages, context.v_pages)
        )
        on_host = Context(k_pages, v_pages, to_numpy(context.page_table), to_numpy(context.page_lengths))
        scores = ReferenceBackend().pooled_scores(queries, on_host, span=span, scale=scale)
        return self.inner.asarray(np.round(scores * GRID) / np.float32(GRID), dtype="float32")


class Changes(Delegate):
    """A backend that keeps every `query_change` in ``seen``, or gives those of an earlier run again."""

    name: ClassVar[str] = "changes"

    def __init__(self, inner: Backend, given: list[Array] | None = None) -> None:
        super().__init__(inner)
        self.given = None if given is None else iter(given)
        self.seen: list[Array] = []

    def query_change(self, q: Array, q_reference: Array) -> Array:
        """Return the change of all heads, whichever of them are here."""
        if self.given is not None:
            return next(self.given)
        self.seen.append(self.inner.query_change(q, q_reference))
        return self.seen[-1]


class Probe(PrefixAttentionPolicy[Any]):
    """A policy that hands every question on, and calls ``check(inner, question, inputs, *answer)`` after it."""

    name: ClassVar[str] = "probe"

    def __init__(self, inner: PrefixAttentionPolicy[Any], check: Callable[..., None]) -> None:
        self.inner = inner
        self.check = check

    @property
    def memory_scope(self) -> Literal["block", "sequence"]:  # type: ignore[override]
        return self.inner.memory_scope

    def computed_tokens(self, info: PassInfo, rows: Array) -> Array:
        return self.inner.computed_tokens(info, rows)

    def active_set(self, inputs: PassInputs[Any]) -> Array:
        active = self.inner.active_set(inputs)
        self.check(self.inner, "active_set", inputs, active)
        return active

    def select_pages(self, inputs: PassInputs[Any], active: Array) -> Selection:
        selection = self.inner.select_pages(inputs, active)
        self.check(self.inner, "select_pages", inputs, active, selection)
        return selection

    def reuse(self, inputs: PassInputs[Any], active: Array, fresh: AttentionState) -> AttentionState:
        state = self.inner.reuse(inputs, active, fresh)
        self.check(self.inner, "reuse", inputs, active, fresh, state)
        return state

    def merge(self, inputs: PassInputs[Any], context_state: AttentionState, block_state: AttentionState) -> Array:
        return self.inner.merge(inputs, context_state, block_state)

    def remember(self, inputs: PassInputs[Any], active: Array, selection: Selection) -> Any:
        memory = self.inner.remember(inputs, active, selection)
        self.check(self.inner, "remember", inputs, active, selection, memory)
        return memory
