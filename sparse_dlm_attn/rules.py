"""Policies whose decisions are one rule, said once: `active_set` and `select_pages` follow from it, fused or not."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sparse_dlm_attn.arrays import Array, namespace, shape_of
from sparse_dlm_attn.context import SUFFIX, Context
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy
from sparse_dlm_attn.ranked import Keep, RankedPass, affordable_pages, kept_queries, united
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.values import short_repr

__all__ = ["GroupScores", "Rule", "RuleMemory", "RulePolicy", "UnionOver", "newest_page"]

UnionOver = Literal["kv_head", "query_head", "row", "layer"]
GroupScores = Literal["query_head", "mean", "max"]
Which = bool | Array
"""Sequences for which something holds: one bool for all of them, or bool ``(batch,)``."""


def newest_page(context: Context) -> Array:
    """Return the last page before the block that holds a token, bool ``(batch, pages)``."""
    xp = namespace(context.page_lengths)
    before = context.exists & ~context.in_segment(SUFFIX)
    ones = xp.astype(before, xp.int32)
    return before & (xp.cumulative_sum(ones, axis=-1) == xp.sum(ones, axis=-1, keepdims=True, dtype=xp.int32))


@dataclass(frozen=True, eq=False)
class Rule:
    """What one layer decides in one pass: rows by the change of their queries, pages by the bounds of their keys.

    Parameters
    ----------
    all_rows, no_rows : bool or array
        Sequences in which every row is active, or none; ``all_rows`` wins. Elsewhere `count` or `mass` decides.
    reference : array, optional
        ``(batch, q_heads, tokens, head_dim)``: queries that change is measured against.
    count, mass : int or float, optional
        Rule of the active rows, one of the two; see :meth:`sparse_dlm_attn.Backend.largest_changes`.
    all_pages : bool or array
        Sequences that read every page. Elsewhere active rows rank pages by the QUEST bound.
    budget : int
        A context of at most this many tokens is read whole.
    pages : int
        Best pages of each active row and ranking head in a longer one.
    newest : bool
        Whether the last page before the block is always one of them.
    union : {"kv_head", "query_head", "row", "layer"}
        Who shares pages: the active rows of a KV head, of a query head, of all heads, or nobody.
    group_scores : {"query_head", "mean", "max"}
        Who ranks: each query head, or each KV head by the mean or the largest of its group's scores.
    keep : {"nothing", "queries", "active_queries"}
        What is kept for the next pass to measure against: nothing, a copy of the queries, or those of active rows
        and the reference of the others.
    """

    all_rows: Which = False
    no_rows: Which = False
    reference: Array | None = None
    count: int | None = None
    mass: float | None = None
    all_pages: Which = False
    budget: int = 0
    pages: int = 1
    newest: bool = False
    union: UnionOver = "kv_head"
    group_scores: GroupScores = "query_head"
    keep: Keep = "nothing"

    __repr__ = short_repr

    @property
    def ranked(self) -> RankedPass | None:
        """The same as an argument of :meth:`Backend.attend_ranked`; None if that cannot say it."""
        plain = self.group_scores == "query_head" and not self.newest
        if self.all_pages is not False or self.no_rows is not False or not plain or self.union == "layer":
            return None
        if self.all_rows is True:
            keep: Keep = "nothing" if self.keep == "nothing" else "queries"
            return RankedPass(self.budget, self.pages, self.union, keep=keep)
        if self.all_rows is not False or self.reads_nothing:
            return None
        return RankedPass(self.budget, self.pages, self.union, self.reference, self.count, self.mass, self.keep)

    @property
    def reads_nothing(self) -> bool:
        """Whether no row can be active, as far as the host knows."""
        if self.all_rows is not False:
            return False
        return self.no_rows is True or (self.mass == 0 if self.mass is not None else self.count == 0)

    def active_rows(self, inputs: PassInputs[Any]) -> Array:
        """Return the active rows, bool ``(batch, tokens)``."""

        def changed() -> Array:
            if self.reads_nothing:  # known on the host: do not measure a change that moves nobody
                return inputs.no_rows()
            change = inputs.ops.query_change(inputs.q, self.reference)
            return inputs.ops.largest_changes(change, count=self.count, mass=self.mass)

        def some() -> Array:
            return inputs.rows_where(self.no_rows, inputs.no_rows, changed)

        return inputs.rows_where(self.all_rows, inputs.all_rows, some)

    def selection(self, inputs: PassInputs[Any], active: Array) -> Selection:
        """Return the pages that active rows read; queries of other rows do not matter."""

        def ranked() -> Selection:
            if self.reads_nothing:  # do not read the bounds either
                return Selection.no_pages(inputs.context, inputs.tokens)
            # The mask comes after the ranking, so an inactive row contributes nothing whatever its query.
            own = self._own_pages(inputs, active) & active[:, None, :, None]
            if self.union == "layer":
                return Selection(inputs.xp.any(own, axis=(1, 2), keepdims=True), inputs.tokens)
            return united(own, inputs.context.kv_heads, self.union)

        return inputs.dense_where(self.all_pages, ranked)

    def kept(self, inputs: PassInputs[Any], active: Array) -> Array | None:
        """Return the queries that the next pass measures change against."""
        return kept_queries(inputs.q, active, self.keep, self.reference)

    def _own_pages(self, inputs: PassInputs[Any], active: Array) -> Array:
        """Choose for every row and ranking head, bool ``(batch, heads, tokens, pages)``."""
        context, ops, xp = inputs.context, inputs.ops, inputs.xp
        scores: Any = ops.page_scores(inputs.q, ops.page_bounds(context), active=active)
        if self.group_scores != "query_head":
            batch, _, tokens, pages = shape_of(scores)
            grouped = xp.reshape(scores, (batch, context.kv_heads, inputs.group, tokens, pages))
            # The sum ranks as the mean does, and no division can round two scores into a tie.
            scores = xp.max(grouped, axis=2) if self.group_scores == "max" else xp.sum(grouped, axis=2)
        # Nothing is eligible for an inactive row, so a backend need not rank its scores either.
        count = affordable_pages(context, self.budget, self.pages)[:, None, None]
        eligible = context.exists[:, None, None, :] & active[:, None, :, None]
        if not self.newest:
            return ops.top_pages(scores, count, eligible=eligible)
        forced = newest_page(context)[:, None, None, :]
        bought = xp.astype(xp.any(forced, axis=-1), count.dtype)  # none where only a suffix exists
        return ops.top_pages(scores, count - bought, eligible=eligible & ~forced) | forced


@dataclass(frozen=True, eq=False)
class RuleMemory:
    """The queries that the next pass is compared with, ``(batch, q_heads, tokens, head_dim)``."""

    reference: Array

    __repr__ = short_repr


class RulePolicy(PrefixAttentionPolicy[RuleMemory]):
    """A policy that states its decisions as a `Rule`; what else a policy answers follows from it.

    A backend may compute such a pass in one go (:meth:`Backend.attend_ranked`). A subclass that overrides one of the
    questions answers it by itself, and its passes run operator by operator.
    """

    states_rules: ClassVar[bool] = True
    """Whether all that a pass decides is in the rule."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        answers = ("active_set", "select_pages", "remember", "reuse", "merge", "computed_tokens")
        cls.states_rules = all(getattr(cls, name) is getattr(RulePolicy, name) for name in answers)

    @abstractmethod
    def rule(self, inputs: PassInputs[RuleMemory]) -> Rule:
        """Return what this pass decides; ``inputs.memory`` holds what the last pass's rule kept."""

    def active_set(self, inputs: PassInputs[RuleMemory]) -> Array:
        """Return the rows that the rule makes active."""
        return self.rule(inputs).active_rows(inputs)

    def select_pages(self, inputs: PassInputs[RuleMemory], active: Array) -> Selection:
        """Return the pages that the rule selects for active rows."""
        return self.rule(inputs).selection(inputs, active)

    def remember(self, inputs: PassInputs[RuleMemory], active: Array, selection: Selection) -> RuleMemory | None:
        """Keep the queries to compare with, if the rule says so."""
        kept = self.rule(inputs).kept(inputs, active) if inputs.kept is None else inputs.kept
        return None if kept is None else RuleMemory(kept)
