"""Policies that compute rows, or keep tokens once, gone wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from policy_mutation import broken, select

from sparse_dlm_attn import PassInfo, PassInputs, Selection
from sparse_dlm_attn.policies.dkv_cache import DKVCache
from sparse_dlm_attn.policies.fast_dllm import FastDLLM
from sparse_dlm_attn.policies.snapkv import SnapKV
from sparse_dlm_attn.policies.sparse_dllm import SparseDLLM


@broken(FastDLLM, "computed_tokens", "POLICY-7")
def fast_dllm_never_refreshes(self: Any, right: Any, info: PassInfo, rows: Any) -> Any:
    return rows if info.window is None else rows & info.window


@broken(FastDLLM, "computed_tokens", "POLICY-7", "POLICY-2")
def fast_dllm_refreshes_when_sequence_0_does(self: Any, right: Any, info: PassInfo, rows: Any) -> Any:
    chosen = right(info, rows)
    return rows if chosen[0].all() else chosen & ~(chosen.all(axis=1, keepdims=True)) | chosen & info.window


@broken(DKVCache, "computed_tokens", "POLICY-7", "POLICY-6", reload=4)
def dkv_keeps_the_key_of_a_mask(self: Any, right: Any, info: PassInfo, rows: Any) -> Any:
    """A token decoded after the previous pass must be computed once more."""
    chosen = right(info, rows)
    if info.decoded is None or chosen.all():
        return chosen
    return chosen & ~info.newly_decoded


@broken(DKVCache, "computed_tokens", "POLICY-6", reload=2)
def dkv_reloads_one_pass_late(self: Any, right: Any, info: PassInfo, rows: Any) -> Any:
    number = info.pass_in_window
    if not isinstance(number, int) or number < 2:
        return right(info, rows)
    return right(PassInfo(number - 1, info.is_save, info.decoded, info.newly_decoded), rows)


@broken(DKVCache, "_being_decoded", "POLICY-6", mode="greedy", neighbours=2, reload=5)
def dkv_centres_choose_from_left_to_right(self: Any, right: Any, info: PassInfo, decoded: Any) -> Any:
    return right(replace(info, planned_order=None), decoded)


def with_neighbours(choose: Callable[[list[int], list[int], list[int]], list[int]]) -> Callable[..., Any]:
    """Compute planned rows, and what ``choose(masked, centres, order)`` adds of the masked ones."""

    def being_decoded(self: Any, right: Any, info: PassInfo, decoded: Any) -> Any:
        if info.planned is None:
            return right(info, decoded)
        rows = info.planned.copy()
        for b, planned in enumerate(info.planned):
            centres = np.flatnonzero(planned).tolist()
            order = centres if info.planned_order is None else [r for r in info.planned_order[b] if r >= 0]
            rows[b, choose(np.flatnonzero(~decoded[b]).tolist(), centres, order)] = True
        return rows

    return being_decoded


def nearest(rows: list[int], centre: int, count: int = 2, *, left: bool = True) -> list[int]:
    return sorted(rows, key=lambda row: (abs(row - centre), row if left else -row))[:count]


def greedy(name: str, choose: Callable[[list[int], list[int], list[int]], list[int]]) -> None:
    function = with_neighbours(choose)
    function.__name__ = name
    broken(DKVCache, "_being_decoded", "POLICY-6", mode="greedy", neighbours=2, reload=5)(function)


def turns(masked: list[int], centres: list[int], order: list[int]) -> list[int]:
    """The next masked row on either side, however far it is."""
    found = []
    for centre in order:
        found += [row for row in masked if row < centre][-1:] + [row for row in masked if row > centre][:1]
    return found


def one_after_another(masked: list[int], centres: list[int], order: list[int], **how: bool) -> list[int]:
    found: list[int] = []
    for centre in order:
        found += nearest([row for row in masked if row not in [*centres, *found]], centre, **how)
    return found


def centres_count(masked: list[int], centres: list[int], order: list[int]) -> list[int]:
    found: list[int] = []
    for centre in order:
        found += nearest([row for row in masked if row not in [centre, *found]], centre)
    return found


greedy("dkv_neighbours_in_turns_whatever_their_distance", turns)
greedy("dkv_prefers_the_right_neighbour", lambda *given: one_after_another(*given, left=False))
greedy("dkv_counts_centres_as_neighbours", centres_count)
greedy(
    "dkv_counts_a_row_for_every_centre",
    lambda masked, centres, order: [
        row for c in order for row in nearest([r for r in masked if r not in centres], c)
    ],
)


@broken(SparseDLLM, "_best_pages", "POLICY-6", ratio=0.4, delay=0)
def sparse_dllm_keeps_one_page_more(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    chosen = right(inputs)
    first = (np.cumsum(inputs.context.exists[:, None, None] & ~chosen, axis=-1) == 1) & ~chosen
    return chosen | first & inputs.context.exists[:, None, None]


@broken(SparseDLLM, "select_pages", "POLICY-6", delay=0, ratio=0.4)
def sparse_dllm_chooses_anew(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    chosen = right(inputs, active)
    if inputs.memory is None or inputs.restarts is not False:
        return chosen
    return select(chosen, self._best_pages(inputs))


@broken(SnapKV, "_best_pages", "POLICY-6", capacity=5, window=2, kernel=3)
def snapkv_drops_its_window(self: Any, right: Any, inputs: PassInputs[Any]) -> Any:
    last = inputs.context.exists & (np.arange(inputs.context.pages) == inputs.context.pages - 1)
    return right(inputs) & ~last[:, None, None]


@broken(SnapKV, "select_pages", "POLICY-6", capacity=5, window=2)
def snapkv_reads_everything_again(self: Any, right: Any, inputs: PassInputs[Any], active: Any) -> Selection:
    return Selection.all_pages(inputs.context, inputs.tokens)
