"""Policies gone wrong in what they read, in who is active, and in the rows that they have computed."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from mutation import Call, Instead, chosen, of_first, table

from sparse_dlm_attn import Selection
from sparse_dlm_attn.policies.dense import Dense
from sparse_dlm_attn.policies.dkv_cache import DKVCache
from sparse_dlm_attn.policies.flashblock import FlashBlock
from sparse_dlm_attn.policies.losa import Losa
from sparse_dlm_attn.policies.mage import Mage
from sparse_dlm_attn.policies.quest import Quest
from sparse_dlm_attn.policies.sliding_window import SlidingWindow
from sparse_dlm_attn.policies.snapkv import SnapKV
from sparse_dlm_attn.policies.sparsed import SparseD
from sparse_dlm_attn.policies.streaming_llm import StreamingLLM

QUEST, WHOLE_QUEST = Quest(budget=4, pages="own", union_over="query_head"), Quest(budget=4)
NEWEST_QUEST = Quest(budget=4, newest=True)
LOSA, DRIFTING_LOSA = Losa(budget=4, active=2), Losa(budget=4, active=2, drift="refresh")
MAGE, WINDOW, STREAMING = Mage(budget=4, dense_layers=0), SlidingWindow(window=5), StreamingLLM(sinks=3, window=2)
SPARSED, SNAPKV = SparseD(ratio=0.4, warmup=1), SnapKV(capacity=5, window=2, kernel=3)
GREEDY = DKVCache(mode="greedy", neighbours=2, reload=5)
Rows = list[int]


def read(x: Call, mask: Any) -> Selection:
    """Return the right selection with another mask: an array, or a function of the right one."""
    right = x.right()
    return chosen(right, mask(right.mask) if callable(mask) else mask)


def exists(x: Call) -> Any:
    return x.inputs.context.exists[:, None, None, :]


def everything(x: Call) -> Selection:
    return Selection.all_pages(x.inputs.context, x.inputs.tokens)


def as_policy(x: Call, policy: Any) -> Any:
    """Return what another policy answers."""
    return policy.select_pages(x.inputs, x.active)


def ruled(x: Call, **changes: Any) -> Selection:
    """Return the selection of the right rule with some fields changed."""
    return replace(x.this.rule(x.inputs), **changes).selection(x.inputs, x.active)


def begun(x: Call) -> bool:
    return x.inputs.restarts is not False


def of_group(x: Call) -> Any:
    """Return the queries of the first head of every group, for the whole group."""
    return np.repeat(x.inputs.q[:, :: x.inputs.group], x.inputs.group, axis=1)


def unsegmented(x: Call) -> Any:
    return x.of(context=replace(x.inputs.context, page_segments=None))


def for_all(mask: Any) -> Any:
    """Return the union over the batch, for every sequence."""
    return np.broadcast_to(mask.any(axis=0, keepdims=True), mask.shape).copy()


def first_physical_page(x: Call) -> Any:
    context = x.inputs.context
    lowest = np.where(context.exists, context.page_table, 2**31 - 1).argmin(axis=1)
    return ((np.arange(context.pages) == lowest[:, None]) & context.exists)[:, None, None, :]


def ranked_anew(x: Call, scores: Any, eligible: Any) -> Any:
    """Return the best pages that the budget buys, whether the context fits or not."""
    count = max(x.this.budget // x.inputs.context.page_size, 1)
    return x.inputs.ops.top_pages(scores, count, eligible=eligible)


def bound_scores(x: Call) -> Any:
    return x.inputs.ops.page_scores(x.inputs.q, x.inputs.ops.page_bounds(x.inputs.context))


def absent_eligible(x: Call) -> Any:
    ops = x.inputs.ops
    return x.of(
        ops=Instead(
            ops,
            top_pages=lambda scores, count, *, eligible: ops.top_pages(
                scores, count, eligible=np.ones(scores.shape, bool)
            ),
        )
    )


def coarse_scores(x: Call) -> Any:
    ops = x.inputs.ops  # rounded as bfloat16 does from 2048 on
    return x.of(
        ops=Instead(
            ops,
            page_scores=lambda q, bounds, *, active=None: (
                np.round(ops.page_scores(q, bounds, active=active) / 16) * 16
            ).astype(np.float32),
        )
    )


def cached_by_shape(x: Call) -> Any:
    kind = type(x.this)
    kind.cache = vars(kind).get("cache") or {}
    return kind.cache.setdefault((x.inputs.q.shape, x.inputs.context.pages), x.right())


table(
    QUEST,
    "select_pages",
    {
        "quest_takes_one_page_more": (
            "POLICY-6",
            lambda x: as_policy(x, replace(QUEST, budget=x.this.budget + x.inputs.context.page_size)),
        ),
        "quest_takes_one_page_less": (
            "POLICY-6",
            lambda x: as_policy(x, replace(QUEST, budget=max(x.this.budget - x.inputs.context.page_size, 1))),
        ),
        "budget_of_tokens_counted_in_pages": (
            "POLICY-6",
            lambda x: as_policy(x, replace(QUEST, budget=x.this.budget * x.inputs.context.page_size)),
        ),
        "pages_of_sequence_0_for_all": ("POLICY-2 POLICY-6", lambda x: read(x, of_first)),
        "mask_of_one_sequence_for_a_batch": ("POLICY-6 SELECTION-1 POLICY-2", lambda x: read(x, lambda mask: mask[:1])),
        "absent_pages_use_up_the_budget": ("POLICY-6", absent_eligible),
        "ranks_in_half_precision": ("POLICY-6", coarse_scores),
        "lowest_scores_are_read": ("POLICY-6", lambda x: x.of(q=-x.inputs.q)),
        "table_entries_of_absent_pages_matter": (
            "POLICY-4",
            lambda x: read(x, lambda mask: mask | (x.inputs.context.page_table.sum(axis=1) < -1)[:, None, None, None]),
        ),
        "physical_order_instead_of_logical": (
            "POLICY-4",
            lambda x: read(x, lambda mask: mask | first_physical_page(x)),
        ),
        "contexts_that_fit_by_their_capacity_only": (
            "POLICY-6",
            lambda x: Selection(  # few tokens in many pages fit, too
                ranked_anew(x, bound_scores(x), exists(x)) & x.active[:, None, :, None], 1
            ),
        ),
        "budget_bought_by_the_shortest_sequence": (
            "POLICY-2 POLICY-6",
            lambda x: everything(x) if (x.inputs.context.tokens <= x.this.budget).any() else x.right(),
        ),
        "reads_more_now_and_then": (
            "POLICY-1",
            lambda x: read(x, lambda mask: mask | ((time.perf_counter_ns() % 3 == 0) & exists(x))),
        ),
        "draws_from_the_global_random_state": (
            "POLICY-1",
            lambda x: read(x, lambda mask: mask | ((np.random.random() < 0.3) & exists(x))),
        ),
        "seeds_the_global_random_state": ("POLICY-1", lambda x: (np.random.seed(0), x.right())[1]),
        "selection_cached_by_shape": ("POLICY-1 MEMORY-1 POLICY-6", cached_by_shape),
    },
)
table(
    WHOLE_QUEST,
    "select_pages",
    {
        "budget_for_the_block_instead_of_each_row": (
            "POLICY-6",
            lambda x: Selection(
                ranked_anew(x, bound_scores(x).max(axis=(1, 2)), x.inputs.context.exists)[:, None, None, :],
                x.inputs.tokens,
            ),
        ),
        "group_shares_the_first_heads_choice": ("POLICY-6", lambda x: x.of(q=of_group(x))),
    },
)
table(
    Quest(budget=4, page_count="ceil"),
    "select_pages",
    {
        "quest_floors_where_it_says_ceil": (
            "POLICY-6",
            lambda x: replace(x.this, page_count="floor").rule(x.inputs).selection(x.inputs, x.active),
        )
    },
)
table(
    NEWEST_QUEST,
    "select_pages",
    {
        "quest_drops_the_newest_page": ("POLICY-6", lambda x: ruled(x, newest=False)),
        "newest_page_of_the_suffix": ("POLICY-6", unsegmented),
    },
)
table(
    Quest(budget=4, first_pass="dense"),
    "select_pages",
    {"quest_forgets_its_dense_pass_0": ("POLICY-6", lambda x: ruled(x, all_pages=False))},
)


def least_changed(x: Call) -> Any:
    if begun(x) or x.inputs.memory is None:
        return x.right()
    change = x.inputs.ops.query_change(x.inputs.q, x.inputs.memory.reference)
    return x.inputs.ops.largest_changes(-change, count=min(x.this.active, x.inputs.tokens))


def but_the_last(rows: Any) -> Any:
    return rows & (np.arange(rows.shape[1]) < rows.shape[1] - 1)


def counted(x: Call) -> Any:
    kind = type(x.this)
    kind.calls = vars(kind).get("calls", 0) + 1
    return x.right() | (kind.calls % 3 == 2)


table(
    LOSA,
    "select_pages",
    {
        "pages_of_inactive_rows_count": ("POLICY-4", lambda x: x.right(active=x.inputs.all_rows())),
        "losa_forgets_its_dense_pass_0": ("POLICY-6", lambda x: ruled(x, all_pages=False)),
        "save_pass_reads_everything": ("POLICY-6", lambda x: x.inputs.dense_where(x.inputs.saves(), lambda: x.right())),
    },
)
table(
    LOSA,
    "active_set",
    {
        "one_active_row_too_many": ("POLICY-6", lambda x: replace(LOSA, active=x.this.active + 1).active_set(x.inputs)),
        "rows_that_changed_least_are_active": ("POLICY-6", least_changed),
        "change_ranked_over_the_batch": ("POLICY-2 POLICY-6", lambda x: x.right() if begun(x) else for_all(x.right())),
        "restart_leaves_rows_out": ("POLICY-6", lambda x: but_the_last(x.right())),
        "counts_its_calls": ("POLICY-1", counted),
    },
)
table(
    Losa(budget=4, mass=0.5),
    "active_set",
    {"count_where_mass_was_asked": ("POLICY-6", lambda x: Losa(budget=4, active=1).active_set(x.inputs))},
)
table(
    replace(LOSA, save_pass="reuse"),
    "active_set",
    {"save_pass_goes_on_as_usual": ("POLICY-6", lambda x: LOSA.active_set(x.inputs))},
)
table(
    Dense(),
    "select_pages",
    {
        "dense_drops_the_last_page": (
            "POLICY-6",
            lambda x: read(x, lambda mask: mask & (np.arange(x.inputs.context.pages) < x.inputs.context.pages - 1)),
        )
    },
)
table(
    WINDOW,
    "select_pages",
    {
        "window_one_token_short": ("POLICY-6", lambda x: as_policy(x, SlidingWindow(window=4))),
        "window_counts_pages": (
            "POLICY-6",
            lambda x: as_policy(x, SlidingWindow(window=5 * x.inputs.context.page_size)),
        ),
        "window_by_capacity_instead_of_tokens": (
            "POLICY-6",
            lambda x: Selection(
                exists(x)
                & (
                    np.arange(x.inputs.context.pages)
                    >= x.inputs.context.pages - -(-x.this.window // x.inputs.context.page_size)
                ),
                x.inputs.tokens,
            ),
        ),
        "window_of_the_longest_sequence": (
            "POLICY-6 POLICY-2",
            lambda x: read(x, lambda mask: of_first(np.roll(mask, -int(x.inputs.context.tokens.argmax()), axis=0))),
        ),
    },
)
table(SlidingWindow(window=3), "select_pages", {"suffix_counts_as_recent": ("POLICY-6", unsegmented)})


def generated_only(x: Call) -> Any:
    context = x.inputs.context
    if context.page_segments is None:
        return x.right()
    left = np.where(context.in_segment(0), 0, context.page_lengths).astype(np.int32)
    return x.of(context=replace(context, page_lengths=left))


table(
    STREAMING,
    "select_pages",
    {
        "sinks_dropped": ("POLICY-6", lambda x: as_policy(x, SlidingWindow(window=x.this.window))),
        "sinks_in_the_first_page_only": (
            "POLICY-6",
            lambda x: Selection(
                as_policy(x, SlidingWindow(window=x.this.window)).mask
                | (exists(x) & (np.arange(x.inputs.context.pages) == 0)),
                x.inputs.tokens,
            ),
        ),
        "sinks_in_the_generated_pages": ("POLICY-6", generated_only),
    },
)


table(
    FlashBlock(limit=1),
    "_refreshes",
    {"limit_must_be_exceeded": ("POLICY-6", lambda x: FlashBlock(limit=2)._refreshes(x.inputs, x.dirty))},
)
table(
    FlashBlock(limit=3),
    "_refreshes",
    {"limit_counted_over_the_batch": ("POLICY-2 POLICY-6", lambda x: x.right(dirty=for_all(x.dirty)))},
)
table(
    FlashBlock(limit=1),
    "active_set",
    {
        "save_pass_does_not_refresh": (
            "POLICY-6",
            lambda x: FlashBlock(limit=1, save_pass="reuse").active_set(x.inputs),
        ),
        "one_sequence_refreshes_all": ("POLICY-2 POLICY-6", lambda x: for_all(x.right())),
    },
)
