"""Stand-ins that laws put around the backend or policy under test: they watch, or make ties exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

from sparse_dlm_attn import (
    AttentionState,
    Backend,
    Context,
    PageBounds,
    PassInfo,
    PassInputs,
    PrefixAttentionPolicy,
    Selection,
)
from sparse_dlm_attn.arrays import Array, to_numpy
from sparse_dlm_attn.capabilities import Capabilities, Problem
from sparse_dlm_attn.ranked import RankedPass, RankedResult
from sparse_dlm_attn_reference import ReferenceBackend

__all__ = ["Changes", "Delegate", "Grid", "Probe", "Ranking", "Watched"]

GRID = 1024.0


class Delegate(Backend):
    """A backend that hands every call on."""

    name: ClassVar[str] = "delegate"

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

    def page_bounds(self, context: Context) -> PageBounds:
        return self.call("page_bounds", context)  # type: ignore[no-any-return]

    def page_scores(self, q: Array, bounds: PageBounds, *, active: Array | None = None) -> Array:
        return self.call("page_scores", q, bounds, active=active)

    def pooled_scores(
        self, q: Array, context: Context, *, span: int, scale: float | None = None, lse: Array | None = None
    ) -> Array:
        return self.call("pooled_scores", q, context, span=span, scale=scale, lse=lse)

    def top_pages(self, scores: Array, count: int | Array, *, eligible: Array) -> Array:
        return self.call("top_pages", scores, count, eligible=eligible)

    def query_change(self, q: Array, q_reference: Array) -> Array:
        return self.call("query_change", q, q_reference)

    def largest_changes(self, change: Array, *, count: int | None = None, mass: float | None = None) -> Array:
        return self.call("largest_changes", change, count=count, mass=mass)

    def attend_pages(
        self, q: Array, context: Context, selection: Selection, active: Array, *, scale: float | None = None
    ) -> AttentionState:
        return self.call("attend_pages", q, context, selection, active, scale=scale)  # type: ignore[no-any-return]

    def attend_block(self, q: Array, k: Array, v: Array, *, scale: float | None = None) -> AttentionState:
        return self.call("attend_block", q, k, v, scale=scale)  # type: ignore[no-any-return]

    def merge(self, *states: AttentionState) -> AttentionState:
        return self.call("merge", *states)  # type: ignore[no-any-return]

    def reuse(self, active: Array, fresh: AttentionState, cached: AttentionState) -> AttentionState:
        return self.call("reuse", active, fresh, cached)  # type: ignore[no-any-return]

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: Context,
        selection: Selection,
        active: Array,
        cached: AttentionState | None,
        *,
        scale: float | None = None,
    ) -> tuple[Array, AttentionState]:
        return self.call(  # type: ignore[no-any-return]
            "attend", q, k, v, context, selection, active, cached, scale=scale
        )


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

    def attend_ranked(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: Context,
        bounds: PageBounds,
        ranked_pass: RankedPass,
        cached: AttentionState | None,
        *,
        scale: float | None = None,
    ) -> RankedResult:
        return self.call(  # type: ignore[no-any-return]
            "attend_ranked", q, k, v, context, bounds, ranked_pass, cached, scale=scale
        )


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
    """A backend that keeps every `query_change`, or gives those of an earlier run again.

    Parameters
    ----------
    inner : Backend
        Computes everything else.
    given : list of array, optional
        What to return, call after call; default: what ``inner`` computes, which is kept in `seen`.
    """

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
    """A policy that hands every question on, and asks one of its own about each answer.

    Parameters
    ----------
    inner : PrefixAttentionPolicy
        The policy under test.
    check : callable
        ``check(inner, question, inputs, *answer)``, called after each answer.
    """

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

    def merge(
        self, inputs: PassInputs[Any], context_state: AttentionState, block_state: AttentionState
    ) -> Array:
        return self.inner.merge(inputs, context_state, block_state)

    def remember(self, inputs: PassInputs[Any], active: Array, selection: Selection) -> Any:
        memory = self.inner.remember(inputs, active, selection)
        self.check(self.inner, "remember", inputs, active, selection, memory)
        return memory
