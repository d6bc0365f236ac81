"""The other policies gone wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from policy_mutation import broken, select

from sparse_dlm_attn import AttentionState, Context, PassInputs, Selection
from sparse_dlm_attn.policies.dense import Dense
from sparse_dlm_attn.policies.flashblock import FlashBlock, FlashBlockMemory
from sparse_dlm_attn.policies.mage import Mage
from sparse_dlm_attn.policies.sliding_window import SlidingWindow
from sparse_dlm_attn.policies.sparsed import SparseD
from sparse_dlm_attn.policies.streaming_llm import StreamingLLM


@broken(Dense, "select_pages", "POLICY-6")
def dense_drops_the_last_page(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    chosen = right(inputs, active)
    return select(chosen, chosen.mask & (np.arange(inputs.context.pages) < inputs.context.pages - 1))


@broken(SlidingWindow, "select_pages", "POLICY-6", window=5)
def window_one_token_short(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return SlidingWindow(window=4).select_pages(inputs, active)


@broken(SlidingWindow, "select_pages", "POLICY-6", window=5)
def window_counts_pages(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    size = inputs.context.page_size
    return SlidingWindow(window=5 * size).select_pages(inputs, active)


@broken(SlidingWindow, "select_pages", "POLICY-6", window=5)
def window_by_capacity_instead_of_tokens(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any
) -> Selection:
    context = inputs.context
    first = context.pages - -(-self.window // context.page_size)
    mask = context.exists & (np.arange(context.pages) >= first)
    return Selection(mask[:, None, None, :], inputs.tokens)


@broken(SlidingWindow, "select_pages", "POLICY-6", "POLICY-2", window=5)
def window_of_the_longest_sequence(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    chosen = right(inputs, active)
    longest = int(inputs.context.tokens.argmax())
    return select(chosen, np.repeat(chosen.mask[longest : longest + 1], len(chosen.mask), axis=0))


@broken(StreamingLLM, "select_pages", "POLICY-6", sinks=3, window=2)
def sinks_dropped(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return SlidingWindow(window=self.window).select_pages(inputs, active)


@broken(StreamingLLM, "select_pages", "POLICY-6", sinks=3, window=2)
def sinks_in_the_first_page_only(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    first = (np.arange(inputs.context.pages) == 0) & inputs.context.exists
    near = SlidingWindow(window=self.window).select_pages(inputs, active)
    return select(near, near.mask | first[:, None, None, :])


@broken(FlashBlock, "_refreshes", "POLICY-6", limit=1)
def limit_must_be_exceeded(self: Any, right: Any, inputs: PassInputs[Any], dirty: Any) -> Any:
    return FlashBlock(limit=self.limit + 1)._refreshes(inputs, dirty)


@broken(FlashBlock, "remember", "POLICY-6", limit=2)
def dirty_rows_never_cleared(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    return FlashBlockMemory(self._dirty(inputs))


@broken(FlashBlock, "remember", "POLICY-6", limit=2)
def dirty_rows_of_one_pass_only(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    return FlashBlockMemory(inputs.no_rows())


@broken(FlashBlock, "active_set", "POLICY-6", limit=1)
def save_pass_does_not_refresh(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    return (
        replace(self, save_pass="reuse").active_set(inputs)
        if type(self) is FlashBlock
        else FlashBlock(limit=1, save_pass="reuse").active_set(inputs)
    )


@broken(FlashBlock, "active_set", "POLICY-2", "POLICY-6", limit=1)
def one_sequence_refreshes_all(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    chosen = right(inputs)
    return np.broadcast_to(chosen.any(axis=0, keepdims=True), chosen.shape).copy()


@broken(FlashBlock, "reuse", "POLICY-5", limit=1)
def dirty_rows_lose_their_fresh_part(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, fresh: Any
) -> Any:
    dirty = self._dirty(inputs)
    return inputs.ops.reuse(dirty, AttentionState.empty_like(inputs.q), fresh)


@broken(Mage, "_best_pages", "POLICY-6", budget=4, dense_layers=0)
def mage_chooses_by_the_first_group_head(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    first = np.repeat(inputs.q[:, :: inputs.group], inputs.group, axis=1)
    return right(replace(inputs, q=first))


@broken(Mage, "_best_pages", "POLICY-6", budget=4, dense_layers=0)
def mage_takes_the_newest_pages(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    chosen = right(inputs)
    return np.broadcast_to(inputs.context.exists[:, None, None, :], chosen.shape) & ~chosen


@broken(Mage, "remember", "POLICY-6", budget=4, dense_layers=0)
def mage_chooses_anew_in_every_pass(
    self: Any, right: Any, inputs: PassInputs[Any], active: Any, selection: Any
) -> Any:
    return right(replace(inputs, restarts=True), active, selection)


@broken(Mage, "select_pages", "POLICY-6", budget=4, dense_layers=1)
def mage_forgets_its_dense_layers(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return (
        Selection.all_pages(inputs.context, inputs.tokens)
        if inputs.info.layer
        else Selection.no_pages(inputs.context, inputs.tokens)
    )


@broken(SparseD, "select_pages", "POLICY-6", ratio=0.4, warmup=1)
def sparsed_keeps_one_page_less(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    chosen = right(inputs, active)
    counts = chosen.mask.sum(axis=-1, keepdims=True)
    last = np.cumsum(chosen.mask, axis=-1) == counts
    return chosen if inputs.restarts is not False else select(chosen, chosen.mask & ~(last & (counts > 1)))


@broken(SparseD, "_best_pages", "POLICY-6", ratio=0.4, warmup=1)
def sparsed_ranks_prompt_and_generated_together(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    return self._best_of(inputs, inputs.context, inputs.context.exists)


@broken(SparseD, "_best_pages", "POLICY-6", ratio=0.4, warmup=1)
def sparsed_forgets_generated_pages(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    return self._best_of(inputs, inputs.context, inputs.context.in_segment(0))


@broken(SparseD, "warmup_passes", "POLICY-6", ratio=0.4, skip=0.0)
def sparsed_warms_up_one_pass_less(self: Any, right: Any, total: int) -> int:
    return right(total) - 1


@broken(SparseD, "_best_of", "POLICY-6", ratio=0.4, warmup=1, span=2)
def sparsed_shares_one_choice_among_heads(
    self: Any, right: Any, inputs: Any, scored: Context, eligible: Any
) -> Any:
    chosen = right(inputs, scored, eligible)
    return np.repeat(chosen[:, :1], chosen.shape[1], axis=1)


@broken(SparseD, "_best_of", "POLICY-6", "POLICY-2", ratio=0.4, warmup=1)
def sparsed_counts_the_pages_of_sequence_0(
    self: Any, right: Any, inputs: Any, scored: Context, eligible: Any
) -> Any:
    mass = inputs.ops.pooled_scores(inputs.q, scored, span=self._span(inputs), scale=inputs.scale)
    count = min(int(eligible[0].sum() * self.ratio) + 1, int(eligible[0].sum()))
    return inputs.ops.top_pages(mass, count, eligible=eligible[:, None, None, :])
