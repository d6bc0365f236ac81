"""Policies gone wrong in what they remember from pass to pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from mutants_passes import (
    by_the_pass_number,
    cached_in_place,
    changed_in_place,
    dirty_in_place,
    kept_in_the_policy,
    view_of_the_decoded,
)
from mutants_policies import DRIFTING_LOSA, LOSA, MAGE, SNAPKV
from mutation import Call, register, table

from sparse_dlm_attn import AttentionState, PassInputs, Selection
from sparse_dlm_attn.policies.flashblock import FlashBlock, FlashBlockMemory
from sparse_dlm_attn.policies.losa import Losa
from sparse_dlm_attn.policies.mage import Mage
from sparse_dlm_attn.policies.quest import Quest
from sparse_dlm_attn.policies.sparsed import SparseD
from sparse_dlm_attn.rules import RuleMemory


def in_this_block(x: Call) -> Any:
    return x.inputs.info.index == 0 if isinstance(x.inputs.info.index, int) else False


table(
    DRIFTING_LOSA,
    "remember",
    {
        "drift_measured_from_the_previous_pass": ("POLICY-6", lambda x: RuleMemory(np.array(x.inputs.q))),
        "refreshed_rows_keep_their_old_reference": ("POLICY-6", lambda x: x.inputs.memory or x.right()),
    },
)
table(
    LOSA,
    "remember",
    {
        "drift_measured_from_the_last_refresh": (
            "POLICY-6",
            lambda x: (
                x.right()
                if x.inputs.memory is None
                else (RuleMemory(np.where(x.active[:, None, :, None], x.inputs.q, x.inputs.memory.reference)))
            ),
        ),
        "reference_queries_frozen_at_pass_0": ("POLICY-6", lambda x: x.inputs.memory or x.right()),
        "reference_is_a_view_of_the_queries": ("PURE-2 POLICY-1", lambda x: RuleMemory(x.inputs.q)),
        "memory_kept_in_the_policy": ("POLICY-1 MEMORY-1 POLICY-6", kept_in_the_policy),
        "memory_changed_in_place": ("POLICY-1 PURE-1", changed_in_place),
    },
)
table(
    LOSA,
    "reuse",
    {
        "cached_rows_win": (
            "POLICY-5 REUSE-1",
            lambda x: x.fresh if x.inputs.cached is None else (x.inputs.ops.reuse(~x.active, x.fresh, x.inputs.cached)),
        ),
        "fresh_and_cached_are_merged": (
            "POLICY-5 REUSE-1",
            lambda x: x.fresh if x.inputs.cached is None else (x.inputs.ops.merge(x.fresh, x.inputs.cached)),
        ),
        "cached_state_changed_in_place": ("POLICY-1 PURE-1", cached_in_place),
        "save_pass_stores_the_cached_states": (
            "REUSE-1 POLICY-5",
            lambda x: x.inputs.cached if (x.inputs.saves() is True and x.inputs.cached) else x.right(),
        ),
    },
)
table(
    LOSA,
    "merge",
    {
        "merge_without_the_block": ("POLICY-5 ATTEND-4", lambda x: x.context_state.out.copy()),
        "merge_by_averaging": (
            "POLICY-5 ATTEND-4",
            lambda x: ((x.context_state.out + x.block_state.out) / 2).astype(x.block_state.out.dtype),
        ),
    },
)
table(
    LOSA,
    "reorder",
    {
        "references_stay_in_the_order_they_had": (
            "MEMORY-4",
            lambda x: RuleMemory(x.memory.reference[np.arange(len(x.indices)) % len(x.memory.reference)]),
        )
    },
)
table(
    FlashBlock(limit=2),
    "remember",
    {
        "dirty_rows_never_cleared": ("POLICY-6", lambda x: FlashBlockMemory(x.this._dirty(x.inputs))),
        "dirty_rows_of_one_pass_only": ("POLICY-6", lambda x: FlashBlockMemory(x.inputs.no_rows())),
        "dirty_rows_are_a_view_of_the_decoded": ("PURE-2 POLICY-1", view_of_the_decoded),
    },
)
table(FlashBlock(limit=3), "remember", {"dirty_rows_added_in_place": ("POLICY-1", dirty_in_place)})
table(
    FlashBlock(limit=1),
    "reuse",
    {
        "dirty_rows_lose_their_fresh_part": (
            "POLICY-5",
            lambda x: x.inputs.ops.reuse(x.this._dirty(x.inputs), AttentionState.empty_like(x.inputs.q), x.fresh),
        )
    },
)
table(
    MAGE,
    "remember",
    {
        "mage_chooses_anew_in_every_pass": ("POLICY-6", lambda x: x.of(restarts=True)),
        "mage_chooses_by_the_pass_number_alone": ("MEMORY-3 POLICY-6", by_the_pass_number),
    },
)
table(
    MAGE,
    "reorder",
    {"pages_of_the_first_sequence_for_all": ("MEMORY-4", lambda x: x.right(indices=np.zeros_like(x.indices)))},
)
table(
    SNAPKV,
    "remember",
    {
        "snapkv_chooses_anew_in_every_block": (
            "POLICY-6",
            lambda x: x.of(memory=None) if in_this_block(x) else x.right(),
        )
    },
)


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


class InventsStates(Losa):
    """Leaves a row out when the block begins, and gives it a context part all the same."""

    def active_set(self, inputs: PassInputs[Any]) -> Any:
        chosen = super().active_set(inputs)
        chosen[:, -1] = False
        return chosen

    def reuse(self, inputs: PassInputs[Any], active: Any, fresh: Any) -> Any:
        state = super().reuse(inputs, active, fresh)
        return AttentionState(state.out, np.where(active[:, None], state.lse, np.float32(0)))


class KeepsScoresBetweenQuestions(Losa):
    """Measures change once in `active_set`, and ranks pages by what it kept there."""

    kept: ClassVar[dict[str, Any]] = {}

    def active_set(self, inputs: PassInputs[Any]) -> Any:
        self.kept["q"] = inputs.q
        return super().active_set(inputs)

    def select_pages(self, inputs: PassInputs[Any], active: Any) -> Selection:
        return super().select_pages(replace(inputs, q=self.kept["q"]), active)


class SelectionOfTheBlockBefore(Mage):
    """Carries its pages into the next block, where its page says that it chooses anew."""

    memory_scope = "sequence"

    def select_pages(self, inputs: PassInputs[Any], active: Any) -> Selection:
        if inputs.memory is None:
            return super().select_pages(inputs, active)
        return Selection(self._frozen(inputs), inputs.tokens)

    def remember(self, inputs: PassInputs[Any], active: Any, selection: Selection) -> Any:
        return inputs.memory or super().remember(inputs, active, selection)


class KeepsItsBlock(Mage):
    """Claims that memory ends with the block, and carries it on by itself."""

    left: Any = None

    def select_pages(self, inputs: PassInputs[Any], active: Any) -> Selection:
        shape = (len(inputs.q), inputs.context.kv_heads, inputs.context.pages)
        if KeepsItsBlock.left is not None and shape == (*KeepsItsBlock.left.shape[:2], KeepsItsBlock.left.shape[-1]):
            return Selection(KeepsItsBlock.left, inputs.tokens)
        return super().select_pages(inputs, active)

    def remember(self, inputs: PassInputs[Any], active: Any, selection: Selection) -> Any:
        memory = super().remember(inputs, active, selection)
        if memory is not None:
            KeepsItsBlock.left = memory.mask
        return memory


class UnionOverTheLayerUndeclared(Quest):
    mixes_heads = False


class ScaleByHeadsUndeclared(SparseD):
    mixes_heads = False


register("ActiveSetOfPass1Forever", "POLICY-6", ActiveSetOfPass1Forever(budget=4, active=2))
register("restart_invents_a_state", "POLICY-3", InventsStates(budget=4, active=2))
register("KeepsScoresBetweenQuestions", "POLICY-1", KeepsScoresBetweenQuestions(budget=4, active=2))
register("SelectionOfTheBlockBefore", "POLICY-6 MEMORY-1", SelectionOfTheBlockBefore(budget=4, dense_layers=0))
register("memory_leaks_into_the_next_block", "MEMORY-1 POLICY-1 POLICY-6", KeepsItsBlock(budget=4, dense_layers=0))
register("UnionOverTheLayerUndeclared", "POLICY-8", UnionOverTheLayerUndeclared(budget=4, union_over="layer"))
register("ScaleByHeadsUndeclared", "POLICY-8", ScaleByHeadsUndeclared(ratio=0.3, warmup=1, score_scale="heads"))
