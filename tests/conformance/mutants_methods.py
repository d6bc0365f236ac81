"""Published methods gone wrong in their own rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from mutants_policies import GREEDY, MAGE, SNAPKV, SPARSED, Rows, begun, everything, exists, of_group, read
from mutation import Call, Instead, table

from sparse_dlm_attn import PassInfo, Selection
from sparse_dlm_attn.policies.dkv_cache import DKVCache
from sparse_dlm_attn.policies.fast_dllm import FastDLLM
from sparse_dlm_attn.policies.mage import Mage
from sparse_dlm_attn.policies.snapkv import SnapKV
from sparse_dlm_attn.policies.sparse_dllm import SparseDLLM
from sparse_dlm_attn.policies.sparsed import SparseD


def mean_of_the_batch(x: Call) -> Any:
    ops = x.inputs.ops

    def pooled_scores(*arguments: Any, **options: Any) -> Any:
        mass = ops.pooled_scores(*arguments, **options)
        return np.broadcast_to(mass.sum(axis=0, keepdims=True), mass.shape).copy()

    return x.of(ops=Instead(ops, pooled_scores=pooled_scores))


table(
    MAGE,
    "_best_pages",
    {
        "mage_chooses_by_the_first_group_head": ("POLICY-6", lambda x: x.of(q=of_group(x))),
        "mage_takes_the_newest_pages": ("POLICY-6", lambda x: np.broadcast_to(exists(x), x.right().shape) & ~x.right()),
        "mage_ranks_by_the_mean_of_the_batch": ("POLICY-2 POLICY-6", mean_of_the_batch),
        "mage_ranks_by_all_heads_and_says_it_does_not": (
            "POLICY-8 POLICY-6",
            lambda x: np.broadcast_to(x.right()[:, :1], x.right().shape).copy(),
        ),
    },
)
table(
    Mage(budget=4, dense_layers=1),
    "select_pages",
    {
        "mage_forgets_its_dense_layers": (
            "POLICY-6",
            lambda x: everything(x) if x.inputs.info.layer else (Selection.no_pages(x.inputs.context, x.inputs.tokens)),
        )
    },
)


def one_page_less(x: Call) -> Any:
    counts = x.right().mask.sum(axis=-1, keepdims=True)
    last = np.cumsum(x.right().mask, axis=-1) == counts
    return x.right() if begun(x) else read(x, lambda mask: mask & ~(last & (counts > 1)))


def counted_by_sequence_0(x: Call) -> Any:
    mass = x.inputs.ops.pooled_scores(x.inputs.q, x.scored, span=x.this._span(x.inputs), scale=x.inputs.scale)
    pages = int(x.eligible[0].sum())
    count = min(int(pages * x.this.ratio) + 1, pages)
    return x.inputs.ops.top_pages(mass, count, eligible=x.eligible[:, None, None, :])


table(SPARSED, "select_pages", {"sparsed_keeps_one_page_less": ("POLICY-6", one_page_less)})
table(
    SPARSED,
    "_best_pages",
    {
        "sparsed_ranks_prompt_and_generated_together": (
            "POLICY-6",
            lambda x: x.this._best_of(x.inputs, x.inputs.context, x.inputs.context.exists),
        ),
        "sparsed_forgets_generated_pages": (
            "POLICY-6",
            lambda x: x.this._best_of(x.inputs, x.inputs.context, x.inputs.context.in_segment(0)),
        ),
    },
)
table(
    SparseD(ratio=0.4, skip=0.0),
    "warmup_passes",
    {"sparsed_warms_up_one_pass_less": ("POLICY-6", lambda x: x.right() - 1)},
)
table(SPARSED, "_best_of", {"sparsed_counts_the_pages_of_sequence_0": ("POLICY-6 POLICY-2", counted_by_sequence_0)})
table(
    replace(SPARSED, span=2),
    "_best_of",
    {
        "sparsed_shares_one_choice_among_heads": (
            "POLICY-6",
            lambda x: np.repeat(x.right()[:, :1], x.right().shape[1], axis=1),
        )
    },
)


def one_page_more(x: Call) -> Any:
    left = exists(x) & ~x.right()
    return x.right() | (left & (np.cumsum(left, axis=-1) == 1))


table(SparseDLLM(ratio=0.4, delay=0), "_best_pages", {"sparse_dllm_keeps_one_page_more": ("POLICY-6", one_page_more)})
table(
    SparseDLLM(ratio=0.4, delay=0),
    "select_pages",
    {
        "sparse_dllm_chooses_anew": (
            "POLICY-6",
            lambda x: x.right() if x.inputs.memory is None or begun(x) else (read(x, x.this._best_pages(x.inputs))),
        )
    },
)
table(
    SNAPKV,
    "_best_pages",
    {
        "snapkv_drops_its_window": (
            "POLICY-6",
            lambda x: x.right() & ~(exists(x) & (np.arange(x.inputs.context.pages) == x.inputs.context.pages - 1)),
        )
    },
)
table(SnapKV(capacity=5, window=2), "select_pages", {"snapkv_reads_everything_again": ("POLICY-6", everything)})
table(
    SNAPKV,
    "select_pages",
    {
        "snapkv_never_sees_the_grown_prefix": (
            "POLICY-6",
            lambda x: x.right() if x.inputs.memory is None else (Selection(x.inputs.memory.mask, x.inputs.tokens)),
        )
    },
)


def with_sequence_0(x: Call) -> Any:
    rows = x.right()
    return x.rows if rows[0].all() else rows & ~rows.all(axis=1, keepdims=True) | rows & x.info.window


def one_pass_late(x: Call) -> Any:
    number, info = x.info.pass_in_window, x.info
    if not isinstance(number, int) or number < 2:
        return x.right()
    return x.right(info=PassInfo(number - 1, info.is_save, info.decoded, info.newly_decoded))


def neighbours(choose: Callable[[Rows, Rows, Rows], Rows]) -> Callable[[Call], Any]:
    """Compute planned rows, and what ``choose(masked, centres, order)`` adds of the masked ones."""

    def mistake(x: Call) -> Any:
        if x.info.planned is None:
            return x.right()
        rows = x.info.planned.copy()
        for b, planned in enumerate(x.info.planned):
            centres = np.flatnonzero(planned).tolist()
            order = centres if x.info.planned_order is None else [r for r in x.info.planned_order[b] if r >= 0]
            rows[b, choose(np.flatnonzero(~x.decoded[b]).tolist(), centres, order)] = True
        return rows

    return mistake


def nearest(rows: Rows, centre: int, left: bool = True) -> Rows:
    return sorted(rows, key=lambda row: (abs(row - centre), row if left else -row))[:2]


def turns(masked: Rows, centres: Rows, order: Rows) -> Rows:
    """Return the next masked row on either side, however far it is."""
    sides = (([r for r in masked if r < c][-1:], [r for r in masked if r > c][:1]) for c in order)
    return [row for before, after in sides for row in before + after]


def in_order(masked: list[int], centres: list[int], order: list[int], left: bool = True, own: bool = False) -> Rows:
    """Return the nearest rows of one centre after another; ``own`` bars a centre from its own rows alone."""
    found: Rows = []
    for centre in order:
        barred = [*([centre] if own else centres), *found]
        found += nearest([row for row in masked if row not in barred], centre, left)
    return found


table(
    FastDLLM(),
    "computed_tokens",
    {
        "fast_dllm_never_refreshes": (
            "POLICY-7",
            lambda x: x.rows if x.info.window is None else x.rows & x.info.window,
        ),
        "fast_dllm_refreshes_when_sequence_0_does": ("POLICY-7 POLICY-2", with_sequence_0),
    },
)
table(
    DKVCache(reload=4),
    "computed_tokens",
    {
        "dkv_keeps_the_key_of_a_mask": (
            "POLICY-7 POLICY-6",
            lambda x: (
                x.right()
                # a decoded token is due once more
                if (x.info.decoded is None or x.right().all())
                else x.right() & ~x.info.newly_decoded
            ),
        ),
        "planned_rows_are_not_computed": (
            "POLICY-7",
            lambda x: x.right() if (x.info.planned is None or x.right().all()) else x.right() & ~x.info.planned,
        ),
    },
)
table(DKVCache(reload=2), "computed_tokens", {"dkv_reloads_one_pass_late": ("POLICY-6", one_pass_late)})
table(
    GREEDY,
    "_being_decoded",
    {
        "dkv_centres_choose_from_left_to_right": (
            "POLICY-6",
            lambda x: x.right(info=replace(x.info, planned_order=None)),
        ),
        "dkv_neighbours_in_turns_whatever_their_distance": ("POLICY-6", neighbours(turns)),
        "dkv_prefers_the_right_neighbour": ("POLICY-6", neighbours(lambda *given: in_order(*given, left=False))),
        "dkv_counts_centres_as_neighbours": ("POLICY-6", neighbours(lambda *given: in_order(*given, own=True))),
        "dkv_counts_a_row_for_every_centre": (
            "POLICY-6",
            neighbours(
                lambda masked, centres, order: [
                    row for centre in order for row in nearest([r for r in masked if r not in centres], centre)
                ]
            ),
        ),
    },
)
