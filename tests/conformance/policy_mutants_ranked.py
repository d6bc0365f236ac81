"""`quest` and `losa` gone wrong, and policies that remember what they may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from policy_mutation import LOSA, POLICIES, QUEST, PolicyMutant, broken, select

from sparse_dlm_attn import AttentionState, PassInputs, Selection
from sparse_dlm_attn.policies.losa import Losa
from sparse_dlm_attn.policies.mage import Mage
from sparse_dlm_attn.policies.quest import Quest
from sparse_dlm_attn.rules import RuleMemory


@broken(Quest, "select_pages", "POLICY-6", **QUEST)
def quest_takes_one_page_more(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return Quest(**{**QUEST, "budget": self.budget + inputs.context.page_size}).select_pages(inputs, active)


@broken(Quest, "select_pages", "POLICY-6", **QUEST)
def quest_takes_one_page_less(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    smaller = max(self.budget - inputs.context.page_size, 1)
    return Quest(**{**QUEST, "budget": smaller}).select_pages(inputs, active)


@broken(Quest, "select_pages", "POLICY-6", budget=4, page_count="ceil")
def quest_floors_where_it_says_ceil(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return replace(self, page_count="floor").rule(inputs).selection(inputs, active)


@broken(Quest, "select_pages", "POLICY-6", budget=4, newest=True)
def quest_drops_the_newest_page(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return replace(self.rule(inputs), newest=False).selection(inputs, active)


@broken(Quest, "select_pages", "POLICY-6", budget=4)
def budget_for_the_block_instead_of_each_row(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    scores = inputs.ops.page_scores(inputs.q, inputs.ops.page_bounds(inputs.context)).max(axis=(1, 2))
    count = max(self.budget // inputs.context.page_size, 1)
    mask = inputs.ops.top_pages(scores, count, eligible=inputs.context.exists)
    return Selection(mask[:, None, None, :], inputs.tokens)


@broken(Quest, "select_pages", "POLICY-6", budget=4)
def group_shares_the_first_heads_choice(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    first = np.repeat(inputs.q[:, :: inputs.group], inputs.group, axis=1)
    return right(replace(inputs, q=first), active)


@broken(Quest, "select_pages", "POLICY-2", "POLICY-6", **QUEST)
def pages_of_sequence_0_for_all(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    chosen = right(inputs, active)
    return select(chosen, np.repeat(chosen.mask[:1], len(chosen.mask), axis=0))


@broken(Quest, "select_pages", "POLICY-6", **QUEST)
def absent_pages_use_up_the_budget(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    class Ops:
        def __getattr__(self, name: str) -> Any:
            return getattr(inputs.ops, name)

        def top_pages(self, scores: Any, count: Any, *, eligible: Any) -> Any:
            return inputs.ops.top_pages(scores, count, eligible=np.ones(scores.shape, bool))

    return right(replace(inputs, ops=Ops()), active)


@broken(Quest, "select_pages", "POLICY-6", **QUEST)
def lowest_scores_are_read(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return right(replace(inputs, q=-inputs.q), active)


@broken(Quest, "select_pages", "POLICY-6", budget=4, first_pass="dense")
def quest_forgets_its_dense_pass_0(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return replace(self.rule(inputs), all_pages=False).selection(inputs, active)


@broken(Quest, "select_pages", "POLICY-4", **QUEST)
def table_entries_of_absent_pages_matter(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    chosen = right(inputs, active)
    return select(chosen, chosen.mask | (inputs.context.page_table.sum(axis=1) < -1)[:, None, None, None])


@broken(Quest, "select_pages", "POLICY-4", **QUEST)
def physical_order_instead_of_logical(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    chosen, context = right(inputs, active), inputs.context
    lowest = np.where(context.exists, context.page_table, 2**31 - 1).argmin(axis=1)
    first = (np.arange(context.pages) == lowest[:, None]) & context.exists
    return select(chosen, chosen.mask | first[:, None, None, :])


@broken(Losa, "select_pages", "POLICY-4", **LOSA)
def pages_of_inactive_rows_count(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return right(inputs, inputs.all_rows())


@broken(Losa, "active_set", "POLICY-6", **LOSA)
def one_active_row_too_many(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    return Losa(**{**LOSA, "active": self.active + 1}).active_set(inputs)


@broken(Losa, "active_set", "POLICY-6", budget=4, mass=0.5)
def count_where_mass_was_asked(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    return (
        replace(self, mass=None, active=1).active_set(inputs)
        if type(self) is Losa
        else Losa(budget=4, active=1).active_set(inputs)
    )


@broken(Losa, "active_set", "POLICY-6", **LOSA)
def rows_that_changed_least_are_active(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    if inputs.restarts is not False or inputs.memory is None:
        return right(inputs)
    change = inputs.ops.query_change(inputs.q, inputs.memory.reference)
    return inputs.ops.largest_changes(-change, count=min(self.active, inputs.tokens))


@broken(Losa, "active_set", "POLICY-2", "POLICY-6", **LOSA)
def change_ranked_over_the_batch(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    chosen = right(inputs)
    return (
        chosen if inputs.restarts is not False else np.broadcast_to(chosen.any(axis=0), chosen.shape).copy()
    )


@broken(Losa, "active_set", "POLICY-6", **LOSA)
def restart_leaves_rows_out(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    chosen = right(inputs)
    chosen[:, -1] = False
    return chosen


class InventsStates(Losa):
    """Leaves a row out when the block begins, and gives it a context part all the same."""

    def active_set(self, inputs: PassInputs[Any]) -> Any:
        chosen = super().active_set(inputs)
        chosen[:, -1] = False
        return chosen

    def reuse(self, inputs: PassInputs[Any], active: Any, fresh: Any) -> Any:
        state = super().reuse(inputs, active, fresh)
        return AttentionState(state.out, np.where(active[:, None], state.lse, np.float32(0)))


POLICIES["restart_invents_a_state"] = PolicyMutant(
    "restart_invents_a_state", ("POLICY-3",), InventsStates(**LOSA)
)


@broken(Losa, "select_pages", "POLICY-6", **LOSA)
def losa_forgets_its_dense_pass_0(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return replace(self.rule(inputs), all_pages=False).selection(inputs, active)


@broken(Losa, "remember", "POLICY-6", budget=4, active=2, drift="refresh")
def drift_measured_from_the_previous_pass(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    return RuleMemory(np.array(inputs.q))


@broken(Losa, "remember", "POLICY-6", **LOSA)
def drift_measured_from_the_last_refresh(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    if inputs.memory is None:
        return right(inputs, active, selection)
    return RuleMemory(np.where(active[:, None, :, None], inputs.q, inputs.memory.reference))


@broken(Losa, "remember", "POLICY-6", **LOSA)
def reference_queries_frozen_at_pass_0(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    return inputs.memory or right(inputs, active, selection)


@broken(Losa, "reuse", "POLICY-5", "REUSE-1", **LOSA)
def cached_rows_win(self: Any, right: Any, inputs: PassInputs[Any], active: Any, fresh: Any) -> Any:
    return fresh if inputs.cached is None else inputs.ops.reuse(~active, fresh, inputs.cached)


@broken(Losa, "reuse", "POLICY-5", "REUSE-1", **LOSA)
def fresh_and_cached_are_merged(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, fresh: Any
) -> Any:
    return fresh if inputs.cached is None else inputs.ops.merge(fresh, inputs.cached)


@broken(Losa, "merge", "POLICY-5", "ATTEND-4", **LOSA)
def merge_without_the_block(self: Any, right: Any, inputs: PassInputs[Any], state: Any, block: Any) -> Any:
    return state.out.copy()


@broken(Losa, "merge", "POLICY-5", "ATTEND-4", **LOSA)
def merge_by_averaging(self: Any, right: Any, inputs: PassInputs[Any], state: Any, block: Any) -> Any:
    return ((state.out + block.out) / 2).astype(block.out.dtype)


@broken(Losa, "active_set", "POLICY-1", **LOSA)
def counts_its_calls(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    calls = type(self).__dict__.get("calls", 0)
    type(self).calls = calls + 1
    return right(inputs) | (calls % 3 == 1)


@broken(Losa, "remember", "POLICY-1", "MEMORY-1", "POLICY-6", **LOSA)
def memory_kept_in_the_policy(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    kept = type(self).__dict__.get("kept")
    if kept is None or kept.reference.shape != inputs.q.shape:
        type(self).kept = kept = right(inputs, active, selection)
    return kept


@broken(Losa, "remember", "POLICY-1", "PURE-1", **LOSA)
def memory_changed_in_place(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    if inputs.memory is None:
        return right(inputs, active, selection)
    inputs.memory.reference[...] = inputs.q
    return inputs.memory


@broken(Losa, "reuse", "POLICY-1", "PURE-1", **LOSA)
def cached_state_changed_in_place(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, fresh: Any
) -> Any:
    state = right(inputs, active, fresh)
    if inputs.cached is not None:
        for name in ("out", "lse"):
            getattr(inputs.cached, name)[...] = getattr(state, name)
    return state


@broken(Quest, "select_pages", "POLICY-1", "MEMORY-1", "POLICY-6", **QUEST)
def selection_cached_by_shape(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    cache = type(self).__dict__.get("cache") or {}
    type(self).cache = cache
    key = (inputs.q.shape, inputs.context.pages)
    return cache.setdefault(key, right(inputs, active))


class KeepsItsBlock(Mage):
    """Claims that memory ends with the block, and carries it on by itself."""

    left: Any = None

    def select_pages(self, inputs: PassInputs[Any], active: Any) -> Selection:
        if (
            KeepsItsBlock.left is not None
            and KeepsItsBlock.left.shape[-1] == inputs.context.pages
            and len(KeepsItsBlock.left) == len(inputs.q)
            and KeepsItsBlock.left.shape[1] == inputs.context.kv_heads
        ):
            return Selection(KeepsItsBlock.left, inputs.tokens)
        return super().select_pages(inputs, active)

    def remember(self, inputs: PassInputs[Any], active: Any, selection: Selection) -> Any:
        memory = super().remember(inputs, active, selection)
        if memory is not None:
            KeepsItsBlock.left = memory.mask
        return memory


POLICIES["memory_leaks_into_the_next_block"] = PolicyMutant(
    "memory_leaks_into_the_next_block",
    ("MEMORY-1", "POLICY-1", "POLICY-6"),
    KeepsItsBlock(budget=4, dense_layers=0),
)
