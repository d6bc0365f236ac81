"""Backends gone wrong in how far queries moved, and in states that they merge and reuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mutants_operators import HALF, backwards, fewer_bits
from mutation import Call, R, first, kept, mutant, of_first, register, state, table

from sparse_dlm_attn import AttentionState
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn_reference import ReferenceBackend

table(
    R,
    "query_change",
    {
        "change_is_a_sum": ("CHANGE-1", lambda x: (x.right() * (x.q.shape[1] * x.q.shape[3])).astype(np.float32)),
        "change_averaged_over_tokens": (
            "CHANGE-1",
            lambda x: np.repeat(x.right().mean(axis=1, keepdims=True), x.q.shape[2], axis=1).astype(np.float32),
        ),
        "change_is_absolute": ("CHANGE-1", lambda x: np.abs(x.q - x.q_reference).mean(axis=(1, 3)).astype(np.float32)),
        "change_is_a_norm": ("CHANGE-1", lambda x: np.sqrt(x.right())),
        "change_of_the_first_head": ("CHANGE-1", lambda x: x.right(q=x.q[:, :1], q_reference=x.q_reference[:, :1])),
        "nan_change_taken_for_none": ("CHANGE-1", lambda x: np.nan_to_num(x.right())),
    },
)


@mutant(R, "query_change", "CHANGE-1 ACCURACY-1", dtypes=HALF)
def change_in_half_precision(x: Call) -> Any:
    with np.errstate(all="ignore"):
        return ((x.q - x.q_reference) ** 2).mean(axis=(1, 3), dtype=np.float16).astype(np.float32)


def by_mass(x: Call, exceeds: bool = False, order: Any = None, total: Any = None) -> Any:
    """Take rows in an order while their sum has not reached a share of the total."""
    taken = np.zeros(x.change.shape, bool)
    for b, row in enumerate(x.change.astype(np.float64)):
        reached, target = 0.0, x.mass * (row.sum() if total is None else total)
        for index in np.argsort(-row, kind="stable") if order is None else order:
            if reached > target or (reached == target and not exceeds):
                break
            taken[b, index], reached = True, reached + row[index]
    return taken


def within_mass(x: Call) -> Any:
    """Keep rows while the sum, the row included, stays within the mass."""
    order = np.argsort(-x.change, axis=1, kind="stable")
    running = np.cumsum(np.take_along_axis(x.change, order, 1).astype(np.float64), axis=1)
    return np.take_along_axis(running <= x.mass * running[:, -1:], np.argsort(order, axis=1), 1)


def massive(mistake: Callable[[Call], Any]) -> Callable[[Call], Any]:
    """Make a mistake where a mass is asked for, and none for a count."""
    return lambda x: x.right() if x.mass is None else mistake(x)


table(
    R,
    "largest_changes",
    {
        "one_row_too_many": ("CHANGE-2", lambda x: x.right(count=None if x.count is None else x.count + 1)),
        "row_ties_to_the_highest": ("CHANGE-2", lambda x: backwards(x.right(change=backwards(x.change)))),
        "nan_changes_rank_last": (
            "CHANGE-2",
            lambda x: (
                x.right() if x.count is None else x.right(change=np.where(np.isnan(x.change), np.float32(-1), x.change))
            ),
        ),
        "changes_below_an_epsilon_tie": (
            "CHANGE-2 CHANGE-3",
            lambda x: x.right(change=np.where(x.change < np.float32(1e-12), np.float32(0), x.change)),
        ),
        "changes_of_the_first_128_rows": (
            "CHANGE-2",
            lambda x: x.right(change=first(x.change, 128, 1, 0 if x.count is None else -1)),
        ),
        "changes_ranked_in_few_bits": (
            "CHANGE-2",
            lambda x: x.right() if x.count is None else x.right(change=fewer_bits(x.change, 0x7F)),
        ),
        "mass_must_be_exceeded": ("CHANGE-3", massive(lambda x: by_mass(x, exceeds=True))),
        "mass_of_an_unsorted_prefix": ("CHANGE-3", massive(lambda x: by_mass(x, order=range(x.change.shape[1])))),
        "mass_of_the_whole_batch": ("CHANGE-3", massive(lambda x: by_mass(x, total=x.change.sum(dtype=np.float64)))),
        "mass_takes_at_least_one_row": ("CHANGE-3", massive(lambda x: x.right() | x.right(count=1, mass=None))),
        "mass_leaves_the_last_row_out": ("CHANGE-3", massive(within_mass)),
        "mass_ignores_nan": ("CHANGE-3", massive(lambda x: x.right(change=np.nan_to_num(x.change)))),
        "mass_over_at_most_64_rows": ("CHANGE-3", massive(lambda x: x.right() & x.right(count=64, mass=None))),
        "mass_reached_but_for_a_tolerance": ("CHANGE-3", massive(lambda x: x.right(mass=x.mass * (1 - 1e-9)))),
    },
)
table(
    R,
    "why_not",
    {
        "why_not_stops_at_the_first_reason": ("CAPS-1", lambda x: x.right()[:1]),
        "why_not_answers_with_a_bool": ("CAPS-1", lambda x: not x.right()),
    },
)
table(R, "asarray", {"asarray_ignores_the_dtype": ("STATE-4", lambda x: np.asarray(x.values))})


def merged(
    x: Call, *, base: float = np.e, shift: bool = True, where: bool = True, lse: Any = None, dtype: Any = np.float64
) -> AttentionState:
    """Merge states, with something left out."""
    with np.errstate(all="ignore"):
        logs = np.stack([part.lse.astype(np.float64) for part in x.states])
        peak = logs.max(axis=0) if shift else np.zeros(logs.shape[1:])
        safe = np.where(np.isneginf(peak), 0, peak)
        weights = (base ** (logs - safe)).astype(dtype)
        total = weights.sum(axis=0, dtype=dtype)
        shares = (weights / np.where(total == 0, 1, total))[..., None]
        parts = [share * part.out.astype(dtype) for share, part in zip(shares, x.states, strict=True)]
        if where:
            parts = [np.where(share == 0, 0, part) for share, part in zip(shares, parts, strict=True)]
        log = np.where(total == 0, -np.inf, safe + np.log(np.where(total == 0, 1, total)))
        return state(sum(parts), log if lse is None else lse(logs), x.states[0])


def infinities_subtracted(x: Call) -> AttentionState:
    with np.errstate(all="ignore"):
        logs = np.stack([part.lse.astype(np.float64) for part in x.states])
        weights = np.exp(logs - logs.max(axis=0))
        shares = weights / weights.sum(axis=0)
        out = sum(share[..., None] * part.out for share, part in zip(shares, x.states, strict=True))
        return state(out, logs.max(axis=0) + np.log(weights.sum(axis=0)), x.states[0])


def pairs_forgotten(x: Call) -> AttentionState:
    """Merge pairwise, but forget to carry the lse of the pair on."""
    pair = x.states[0]
    for other in x.states[1:]:
        pair = AttentionState(R.merge(pair, other).out, other.lse)
    return AttentionState(pair.out, x.right().lse)


table(
    R,
    "merge",
    {
        "merge_averages_the_outs": (
            "MERGE-1",
            lambda x: state(np.mean([part.out for part in x.states], axis=0), x.right().lse, x.right()),
        ),
        "merge_takes_the_largest_lse": ("MERGE-1", lambda x: merged(x, lse=lambda logs: logs.max(axis=0))),
        "merge_adds_the_lses": ("MERGE-1", lambda x: merged(x, lse=lambda logs: logs.sum(axis=0))),
        "merge_drops_a_third_state": ("MERGE-1", lambda x: x.right(states=x.states[:2])),
        "merge_in_base_two": ("MERGE-1", lambda x: merged(x, base=2.0)),
        "merge_without_a_shift_overflows": ("MERGE-1", lambda x: merged(x, shift=False)),
        "merge_multiplies_by_zero": ("MERGE-4", lambda x: merged(x, where=False)),
        "merge_papers_nan_over": (
            "MERGE-4",
            lambda x: R.merge(*(AttentionState(np.nan_to_num(part.out), part.lse) for part in x.states)),
        ),
        "merge_subtracts_infinities": ("MERGE-3", infinities_subtracted),
        "merge_keeps_the_weights_of_pairs": ("MERGE-1 MERGE-2", pairs_forgotten),
        "merge_in_half_precision": ("ACCURACY-2 MERGE-1", lambda x: merged(x, dtype=np.float16)),
        "merge_hands_a_single_state_back": ("PURE-2", lambda x: x.states[0] if len(x.states) == 1 else x.right()),
        "merge_of_the_first_32_rows": ("MERGE-1", lambda x: kept(x.right(), np.arange(x.right().lse.shape[2]) < 32)),
        "merge_of_at_most_16_states": ("MERGE-1", lambda x: x.right(states=x.states[:16])),
        "merge_of_the_first_four_sequences": (
            "MERGE-1",
            lambda x: kept(x.right(), (np.arange(len(x.right().lse)) < 4)[:, None, None]),
        ),
    },
)
table(
    R,
    "merge",
    {
        "merge_rounds_the_lse_to_the_dtype": (
            "ACCURACY-2 MERGE-1",
            lambda x: R.merge(
                *(AttentionState(part.out, part.lse.astype(np.float16).astype(np.float32)) for part in x.states)
            ),
        )
    },
    ("float16",),
)


def blended(x: Call) -> AttentionState:
    rows = x.active[:, None, :].astype(np.float32)
    with np.errstate(all="ignore"):
        out = rows[..., None] * x.fresh.out + (1 - rows[..., None]) * x.cached.out
    return state(out, x.right().lse, x.fresh)


def written_into_the_cache(x: Call) -> AttentionState:
    for name in ("out", "lse"):
        getattr(x.cached, name).flags.writeable = True
    right = x.right()
    x.cached.out[...], x.cached.lse[...] = right.out, right.lse
    return right


table(
    R,
    "reuse",
    {
        "reuse_inverted": ("REUSE-1", lambda x: x.right(active=~x.active)),
        "reuse_keeps_the_cached_lse": ("REUSE-1", lambda x: AttentionState(x.right().out, x.cached.lse.copy())),
        "reuse_blends": ("REUSE-1", blended),
        "reuse_by_the_rows_of_sequence_0": ("REUSE-1", lambda x: x.right(active=of_first(x.active))),
        "reuse_takes_nan_for_empty": (
            "REUSE-1",
            lambda x: state(x.right().out, np.where(np.isnan(x.right().lse), -np.inf, x.right().lse), x.right()),
        ),
        "reuse_returns_views": ("PURE-2", lambda x: x.fresh if x.active.all() else x.right()),
        "reuse_writes_into_the_cache": ("PURE-1", written_into_the_cache),
        "reuse_of_the_first_four_sequences": (
            "REUSE-1",
            lambda x: x.right(active=x.active | (np.arange(len(x.active)) >= 4)[:, None]),
        ),
    },
)


class SizesAsAList(ReferenceBackend):
    """`capabilities` must be hashable values that a reader can trust: tuples."""

    name = "declares_sizes_as_a_list"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("float32",), page_sizes=[1, 2, 4])


class AcceptsMore(ReferenceBackend):
    name = "accepts_what_it_does_not_declare"
    capabilities = Capabilities(dtypes=("float32",), page_sizes=(4, 16))

    def why_not(self, problem: Any) -> Any:
        return Capabilities(dtypes=("float32",)).why_not(problem)


for kind in (SizesAsAList, AcceptsMore):
    register(kind.name, "CAPS-1", kind(), "why_not")
