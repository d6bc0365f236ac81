"""Whole passes gone wrong, and policies in what they carry from pass to pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from mutation import Call, Instead, R, chosen, table

from sparse_dlm_attn import AttentionState, ranked
from sparse_dlm_attn.policies.flashblock import FlashBlockMemory
from sparse_dlm_attn.policies.mage import MageMemory
from sparse_dlm_attn.ranked import RankedResult


def fused(mistake: Callable[..., Any]) -> Callable[[Call], Any]:
    """Make a mistake in a pass: a function of the call, its fresh state, the state in use and the block's."""

    def run(x: Call) -> Any:
        fresh = R.attend_pages(x.q, x.context, x.selection, x.active, scale=x.scale)
        used = fresh if x.cached is None else R.reuse(x.active, fresh, x.cached)
        return mistake(x, fresh, used, R.attend_block(x.q, x.k, x.v, scale=x.scale))

    return run


def twice_merged(x: Call, fresh: Any, used: Any, block: Any) -> Any:
    joined = fresh if x.cached is None else R.merge(fresh, x.cached)
    return R.merge(joined, block).out, joined


def zero_times_unwritten(x: Call, fresh: Any, used: Any, block: Any) -> Any:
    out = R.merge(used, block).out
    return np.where(np.isnan(used.out).any(axis=-1, keepdims=True), np.nan, out).astype(out.dtype), used


def tainted(x: Call, fresh: Any, used: Any, block: Any) -> Any:
    taint = 0 if x.cached is None else 0 * x.cached.out
    return (R.merge(used, block).out + taint).astype(x.q.dtype), used


table(
    R,
    "attend",
    {
        "attend_forgets_what_was_cached": (
            "ATTEND-4",
            fused(lambda x, fresh, used, block: (R.merge(fresh, block).out, fresh)),
        ),
        "attend_returns_the_fresh_part_only": (
            "ATTEND-4",
            fused(lambda x, fresh, used, block: (R.merge(used, block).out, fresh)),
        ),
        "attend_caches_the_block_too": (
            "ATTEND-4",
            fused(lambda x, fresh, used, block: (R.merge(used, block).out, R.merge(used, block))),
        ),
        "attend_counts_the_block_twice": (
            "ATTEND-4",
            fused(lambda x, fresh, used, block: (R.merge(used, block, block).out, used)),
        ),
        "attend_merges_fresh_with_cached": ("ATTEND-4", fused(twice_merged)),
        "attend_leaves_the_block_out": ("ATTEND-4", fused(lambda x, fresh, used, block: (used.out, used))),
        "attend_multiplies_unwritten_memory_by_zero": ("MERGE-4", fused(zero_times_unwritten)),
        "attend_papers_cached_nan_over": (
            "MERGE-4",
            fused(
                lambda x, fresh, used, block: (
                    R.merge(AttentionState(np.nan_to_num(used.out), used.lse), block).out,
                    used,
                )
            ),
        ),
        "attend_hands_back_the_cached_state": (
            "PURE-2",
            fused(
                lambda x, fresh, used, block: (
                    R.merge(used, block).out,
                    used if x.cached is None or x.active.any() else x.cached,
                )
            ),
        ),
        "attend_reads_what_is_cached_for_active_rows": ("ATTEND-4", fused(tainted)),
        "cached_states_of_at_most_three_sequences": (
            "ATTEND-4",
            lambda x: x.right(cached=None if len(x.q) > 3 else x.cached),
        ),
        "cached_states_of_at_most_sixteen_sequences": (
            "ATTEND-4",
            lambda x: x.right(cached=None if len(x.q) > 16 else x.cached),
        ),
        "blocks_of_the_first_eight_kv_heads": (
            "ATTEND-4",
            lambda x: x.right(v=np.where((np.arange(x.k.shape[1]) < 8)[None, :, None, None], x.v, 0).astype(x.v.dtype)),
        ),
    },
)


def ruled(x: Call, ops: Any = R, cached: Any = ..., **changes: Any) -> RankedResult:
    """Return the ranked pass by another rule, with other operators, or with other states."""
    rule = replace(x.ranked_pass, **changes)
    given = (x.q, x.k, x.v, x.context, x.bounds, rule, x.cached if cached is ... else cached)
    return ranked.attend_ranked(ops, *given, x.scale)


def with_pages(result: RankedResult, mask: Any) -> RankedResult:
    return replace(result, selection=chosen(result.selection, mask))


def ties_to_the_highest(scores: Any, count: Any, *, eligible: Any) -> Any:
    mask = np.ascontiguousarray(np.broadcast_to(eligible, scores.shape)[..., ::-1])
    return R.top_pages(np.ascontiguousarray(scores[..., ::-1]), count, eligible=mask)[..., ::-1].copy()


def change_of_a_head(q: Any, other: Any) -> Any:
    return ((q.astype(np.float64) - other) ** 2).max(axis=(1, 3)).astype(np.float32)


def single(mass: float | None) -> float | None:
    """Return a mass as a kernel gets it."""
    return None if mass is None else min(float(np.float32(mass)), 1.0)


def shared_by_the_group(x: Call) -> RankedResult:
    if x.ranked_pass.union != "query_head":
        return x.right()
    shared = ruled(x, union="kv_head").selection.mask
    return with_pages(x.right(), np.repeat(shared, x.right().selection.heads // shared.shape[1], axis=1))


def last_page_read(x: Call) -> RankedResult:
    """Decide as it should be, and attend to the last page of the table all the same."""
    if not x.context.pages:
        return x.right()
    result = x.right()
    mask = result.selection.mask.copy()
    mask[..., -1] = True
    more = R.attend_pages(x.q, x.context, chosen(result.selection, mask), result.active)
    return replace(result, state=R.reuse(result.active, more, result.state))


def change_of_16_heads(x: Call) -> RankedResult:
    rule = x.ranked_pass
    if rule.reference is None or x.q.shape[1] <= 16:
        return x.right()
    change = R.query_change(x.q[:, :16], rule.reference[:, :16])
    return replace(x.right(), active=R.largest_changes(change, count=rule.count, mass=rule.mass))


table(
    R,
    "attend_ranked",
    {
        "ranked_ties_to_the_highest_page": ("RANKED-1", lambda x: ruled(x, Instead(R, top_pages=ties_to_the_highest))),
        "ranked_budget_must_exceed_the_context": (
            "RANKED-1",
            lambda x: ruled(x, budget=max(x.ranked_pass.budget - 1, 0)),
        ),
        "ranked_budget_of_one_token_more": ("RANKED-1", lambda x: ruled(x, budget=x.ranked_pass.budget + 1)),
        "ranked_takes_one_page_more": ("RANKED-1", lambda x: ruled(x, pages=x.ranked_pass.pages + 1)),
        "ranked_chooses_in_a_context_that_fits": ("RANKED-1", lambda x: ruled(x, budget=0)),
        "ranked_budget_of_the_longest_sequence": (
            "RANKED-1",
            lambda x: ruled(  # as a check on the host would
                x, budget=2**31 - 1 if (x.context.tokens <= x.ranked_pass.budget).all() else 0
            ),
        ),
        "ranked_by_the_largest_change_of_a_head": (
            "RANKED-1",
            lambda x: ruled(x, Instead(R, query_change=change_of_a_head)),
        ),
        "ranked_count_takes_one_row_more": (
            "RANKED-1",
            lambda x: ruled(  # rank <= count for rank < count
                x, count=None if x.ranked_pass.count is None else x.ranked_pass.count + 1
            ),
        ),
        "ranked_mass_of_every_row": ("RANKED-1", lambda x: ruled(x, mass=None if x.ranked_pass.mass is None else 1.0)),
        "ranked_mass_in_single_precision": ("RANKED-1", lambda x: ruled(x, mass=single(x.ranked_pass.mass))),
        "ranked_union_over_inactive_rows_too": (
            "RANKED-1",
            lambda x: replace(
                x.right(), selection=ruled(x, reference=None, count=None, mass=None, keep="nothing").selection
            ),
        ),
        "ranked_union_over_the_group_where_heads_choose": ("RANKED-1", shared_by_the_group),
        "ranked_keeps_the_old_reference": (
            "RANKED-1",
            lambda x: (
                x.right()
                if (x.right().kept is None or x.ranked_pass.reference is None)
                else replace(x.right(), kept=x.ranked_pass.reference.copy())
            ),
        ),
        "ranked_keeps_the_queries_of_inactive_rows": (
            "RANKED-1",
            lambda x: x.right() if x.right().kept is None else (replace(x.right(), kept=x.q.copy())),
        ),
        "ranked_keeps_the_queries_without_a_copy": (
            "PURE-2",
            lambda x: replace(x.right(), kept=x.q) if x.ranked_pass.keep == "queries" else x.right(),
        ),
        "ranked_forgets_what_was_cached": ("RANKED-1", lambda x: ruled(x, cached=None)),
        "ranked_reads_the_last_page_in_any_case": ("RANKED-1", last_page_read),
        "ranked_pages_in_one_word": (
            "RANKED-1",
            lambda x: with_pages(x.right(), x.right().selection.mask & (np.arange(x.context.pages) < 64)),
        ),
        "ranked_rows_in_one_warp": (
            "RANKED-1",
            lambda x: replace(x.right(), active=x.right().active & (np.arange(x.q.shape[2]) < 32)),
        ),
        "ranked_states_of_at_most_eight_sequences": (
            "RANKED-1",
            lambda x: x.right(cached=None if len(x.q) > 8 else x.cached),
        ),
        "ranked_change_of_the_first_sixteen_heads": ("RANKED-1", change_of_16_heads),
    },
)


def kept_in_the_policy(x: Call) -> Any:
    kind = type(x.this)
    stored = vars(kind).get("kept")
    if stored is None or stored.reference.shape != x.inputs.q.shape:
        kind.kept = stored = x.right()
    return stored


def changed_in_place(x: Call) -> Any:
    if x.inputs.memory is None:
        return x.right()
    x.inputs.memory.reference[...] = x.inputs.q
    return x.inputs.memory


def cached_in_place(x: Call) -> Any:
    right = x.right()
    for name in ("out", "lse") if x.inputs.cached is not None else ():
        getattr(x.inputs.cached, name)[...] = getattr(right, name)
    return right


def view_of_the_decoded(x: Call) -> Any:
    newly = x.inputs.info.newly_decoded
    same = x.inputs.memory is not None and newly is not None and (newly == x.right().dirty).all()
    return FlashBlockMemory(newly) if same else x.right()


def dirty_in_place(x: Call) -> Any:
    if x.inputs.memory is None:
        return FlashBlockMemory(x.right().dirty.copy())
    x.inputs.memory.dirty[...] = x.right().dirty
    return x.inputs.memory


def by_the_pass_number(x: Call) -> Any:
    """Leave no choice after a restart in the middle of a block, so that nothing is read."""
    if x.inputs.memory is None and x.inputs.info.index != 0:
        return MageMemory(np.zeros_like(x.this._best_pages(x.inputs)))
    return x.right()
