"""Policies gone wrong in what they carry from pass to pass, from block to block, and over heads."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from policy_mutation import LOSA, POLICIES, QUEST, PolicyMutant, broken, select

from sparse_dlm_attn import PassInfo, PassInputs, Selection
from sparse_dlm_attn.policies.dkv_cache import DKVCache
from sparse_dlm_attn.policies.flashblock import FlashBlock, FlashBlockMemory
from sparse_dlm_attn.policies.losa import Losa
from sparse_dlm_attn.policies.mage import Mage, MageMemory
from sparse_dlm_attn.policies.quest import Quest
from sparse_dlm_attn.policies.sliding_window import SlidingWindow
from sparse_dlm_attn.policies.snapkv import SnapKV
from sparse_dlm_attn.policies.sparsed import SparseD
from sparse_dlm_attn.policies.streaming_llm import StreamingLLM
from sparse_dlm_attn.ranked import RankedPass
from sparse_dlm_attn.rules import RuleMemory


def register(policy: Any, *clauses: str) -> None:
    name = type(policy).__name__
    POLICIES[name] = PolicyMutant(name, clauses, policy)


@dataclass(frozen=True, eq=False)
class WithRows(RuleMemory):
    rows: Any = None


class ActiveSetOfPass1Forever(Losa):
    def active_set(self, inputs: PassInputs[Any]) -> Any:
        kept = getattr(inputs.memory, "rows", None)
        return super().active_set(inputs) if inputs.restarts is not False or kept is None else kept

    def remember(self, inputs: PassInputs[Any], active: Any, selection: Selection) -> Any:
        memory = super().remember(inputs, active, selection)
        begun = inputs.restarts is not False
        kept = None if begun else getattr(inputs.memory, "rows", None)
        return WithRows(memory.reference, active.copy() if kept is None and not begun else kept)


register(ActiveSetOfPass1Forever(**LOSA), "POLICY-6")


@broken(Losa, "remember", "POLICY-6", drift="refresh", **LOSA)
def refreshed_rows_keep_their_old_reference(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    return inputs.memory or right(inputs, active, selection)


@broken(Losa, "remember", "PURE-2", "POLICY-1", **LOSA)
def reference_is_a_view_of_the_queries(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    return RuleMemory(inputs.q)


@broken(FlashBlock, "remember", "PURE-2", "POLICY-1", limit=2)
def dirty_rows_are_a_view_of_the_decoded(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    memory = right(inputs, active, selection)
    newly = inputs.info.newly_decoded
    same = inputs.memory is not None and newly is not None and (newly == memory.dirty).all()
    return FlashBlockMemory(newly) if same else memory


@broken(FlashBlock, "remember", "POLICY-1", limit=3)
def dirty_rows_added_in_place(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    memory = right(inputs, active, selection)
    if inputs.memory is None:
        return FlashBlockMemory(memory.dirty.copy())
    inputs.memory.dirty[...] = memory.dirty
    return inputs.memory


@broken(Quest, "select_pages", "POLICY-6", **QUEST)
def budget_of_tokens_counted_in_pages(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    return Quest(**{**QUEST, "budget": self.budget * inputs.context.page_size}).select_pages(inputs, active)


@broken(Quest, "select_pages", "POLICY-6", **QUEST)
def contexts_that_fit_by_their_capacity_only(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    """A context of a few tokens in many pages fits into the budget, and is cut all the same."""
    rule = RankedPass(0, max(self.budget // inputs.context.page_size, 1), "row")
    scores = inputs.ops.page_scores(inputs.q, inputs.ops.page_bounds(inputs.context))
    mask = inputs.ops.top_pages(scores, rule.pages, eligible=inputs.context.exists[:, None, None, :])
    return Selection(mask & active[:, None, :, None], 1)


@broken(Quest, "select_pages", "POLICY-2", "POLICY-6", **QUEST)
def budget_bought_by_the_shortest_sequence(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    if (inputs.context.tokens <= self.budget).any():
        return Selection.all_pages(inputs.context, 1 if inputs.tokens == 1 else inputs.tokens)
    return right(inputs, active)


@broken(Quest, "select_pages", "POLICY-6", budget=4, newest=True)
def newest_page_of_the_suffix(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return right(replace(inputs, context=replace(inputs.context, page_segments=None)), active)


@broken(Quest, "select_pages", "POLICY-6", "SELECTION-1", "POLICY-2", **QUEST)
def mask_of_one_sequence_for_a_batch(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    chosen = right(inputs, active)
    return select(chosen, chosen.mask[:1])


@broken(Quest, "select_pages", "POLICY-6", **QUEST)
def ranks_in_half_precision(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    class Ops:
        def __getattr__(self, name: str) -> Any:
            return getattr(inputs.ops, name)

        def page_scores(self, q: Any, bounds: Any, *, active: Any = None) -> Any:
            scores = inputs.ops.page_scores(q, bounds, active=active)
            return (np.round(scores / 16) * 16).astype(np.float32)  # as bfloat16 does from 2048 on

    return right(replace(inputs, ops=Ops()), active)


@broken(Quest, "select_pages", "POLICY-1", **QUEST)
def reads_more_now_and_then(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    chosen = right(inputs, active)
    extra = time.perf_counter_ns() % 3 == 0
    return select(chosen, chosen.mask | (extra & inputs.context.exists[:, None, None, :]))


@broken(Quest, "select_pages", "POLICY-1", **QUEST)
def draws_from_the_global_random_state(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    chosen = right(inputs, active)
    return select(
        chosen, chosen.mask | ((np.random.random() < 0.3) & inputs.context.exists[:, None, None, :])
    )


@broken(Quest, "select_pages", "POLICY-1", **QUEST)
def seeds_the_global_random_state(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    np.random.seed(0)
    return right(inputs, active)


class KeepsScoresBetweenQuestions(Losa):
    """Measures change once in `active_set`, and ranks pages by what it kept there."""

    kept: ClassVar[dict[str, Any]] = {}

    def active_set(self, inputs: PassInputs[Any]) -> Any:
        self.kept["q"] = inputs.q
        return super().active_set(inputs)

    def select_pages(self, inputs: PassInputs[Any], active: Any) -> Selection:
        return super().select_pages(replace(inputs, q=self.kept["q"]), active)


register(KeepsScoresBetweenQuestions(**LOSA), "POLICY-1")


class SelectionOfTheBlockBefore(Mage):
    """Carries its pages into the next block, where its page says that it chooses anew."""

    memory_scope = "sequence"

    def select_pages(self, inputs: PassInputs[Any], active: Any) -> Selection:
        if inputs.memory is None:
            return super().select_pages(inputs, active)
        return Selection(self._frozen(inputs), inputs.tokens)

    def remember(self, inputs: PassInputs[Any], active: Any, selection: Selection) -> Any:
        return inputs.memory or super().remember(inputs, active, selection)


register(SelectionOfTheBlockBefore(budget=4, dense_layers=0), "POLICY-6", "MEMORY-1")


@broken(SnapKV, "select_pages", "POLICY-6", capacity=5, window=2, kernel=3)
def snapkv_never_sees_the_grown_prefix(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    if inputs.memory is None:
        return right(inputs, active)
    return Selection(inputs.memory.mask, inputs.tokens)


@broken(SnapKV, "remember", "POLICY-6", capacity=5, window=2, kernel=3)
def snapkv_chooses_anew_in_every_block(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    begun = inputs.info.index == 0 if isinstance(inputs.info.index, int) else False
    return right(replace(inputs, memory=None) if begun else inputs, active, selection)


@broken(Losa, "active_set", "POLICY-6", save_pass="reuse", **LOSA)
def save_pass_goes_on_as_usual(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    return Losa(**LOSA).active_set(inputs)


@broken(Losa, "select_pages", "POLICY-6", **LOSA)
def save_pass_reads_everything(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return inputs.dense_where(inputs.saves(), lambda: right(inputs, active))


@broken(Losa, "reuse", "REUSE-1", "POLICY-5", **LOSA)
def save_pass_stores_the_cached_states(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, fresh: Any
) -> Any:
    return inputs.cached if inputs.saves() is True and inputs.cached else right(inputs, active, fresh)


@broken(Mage, "_best_pages", "POLICY-2", "POLICY-6", budget=4, dense_layers=0)
def mage_ranks_by_the_mean_of_the_batch(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    class Ops:
        def __getattr__(self, name: str) -> Any:
            return getattr(inputs.ops, name)

        def pooled_scores(self, *arguments: Any, **options: Any) -> Any:
            mass = inputs.ops.pooled_scores(*arguments, **options)
            return np.broadcast_to(mass.sum(axis=0, keepdims=True), mass.shape).copy()

    return right(replace(inputs, ops=Ops()))


@broken(FlashBlock, "_refreshes", "POLICY-2", "POLICY-6", limit=3)
def limit_counted_over_the_batch(self: Any, right: Any, inputs: PassInputs[Any], dirty: Any) -> Any:
    return right(inputs, np.broadcast_to(dirty.any(axis=0), dirty.shape))


@broken(Mage, "_best_pages", "POLICY-8", "POLICY-6", budget=4, dense_layers=0)
def mage_ranks_by_all_heads_and_says_it_does_not(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    chosen = right(inputs)
    return np.broadcast_to(chosen[:, :1], chosen.shape).copy()


class UnionOverTheLayerUndeclared(Quest):
    mixes_heads = False


register(UnionOverTheLayerUndeclared(budget=4, union_over="layer"), "POLICY-8")


class ScaleByHeadsUndeclared(SparseD):
    mixes_heads = False


register(ScaleByHeadsUndeclared(ratio=0.3, warmup=1, score_scale="heads"), "POLICY-8")


@broken(SlidingWindow, "select_pages", "POLICY-6", window=3)
def suffix_counts_as_recent(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return right(replace(inputs, context=replace(inputs.context, page_segments=None)), active)


@broken(StreamingLLM, "select_pages", "POLICY-6", sinks=3, window=2)
def sinks_in_the_generated_pages(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    if inputs.context.page_segments is None:
        return right(inputs, active)
    generated = np.where(inputs.context.in_segment(0), 0, inputs.context.page_lengths).astype(np.int32)
    later = replace(inputs.context, page_lengths=generated)
    return right(replace(inputs, context=later), active)


@broken(DKVCache, "computed_tokens", "POLICY-7", reload=4)
def planned_rows_are_not_computed(self: Any, right: Any, info: PassInfo, rows: Any) -> Any:
    chosen = right(info, rows)
    return chosen if info.planned is None or chosen.all() else chosen & ~info.planned


@broken(Losa, "reorder", "MEMORY-4", **LOSA)
def references_stay_in_the_order_they_had(self: Any, right: Any, memory: Any, indices: Any) -> Any:
    return RuleMemory(memory.reference[np.arange(len(indices)) % len(memory.reference)])


@broken(Mage, "reorder", "MEMORY-4", budget=4, dense_layers=0)
def pages_of_the_first_sequence_for_all(self: Any, right: Any, memory: Any, indices: Any) -> Any:
    return right(memory, np.zeros_like(indices))


@broken(Mage, "remember", "MEMORY-3", "POLICY-6", budget=4, dense_layers=0)
def mage_chooses_by_the_pass_number_alone(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    """After a restart in the middle of a block there is no choice, and nothing is read."""
    if inputs.memory is None and inputs.info.index != 0:
        return MageMemory(np.zeros_like(self._best_pages(inputs)))
    return right(inputs, active, selection)
