"""A rule says the same to the operators and to `attend_ranked`; policies that answer by themselves keep their say."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from policy_cases import denoise, make_block

from sparse_dlm_attn import Backend, PassInputs, Rule, RulePolicy, get_policy
from sparse_dlm_attn.policies.quest import Quest
from sparse_dlm_attn.ranked import RankedPass, RankedResult
from sparse_dlm_attn.rules import RuleMemory
from sparse_dlm_attn_reference import ReferenceBackend


class Ranking(ReferenceBackend):
    """The reference, asked for ranked passes."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[RankedPass] = []

    def attend_ranked(self, *arguments: Any, **options: Any) -> RankedResult:
        self.asked.append(arguments[5])
        return super().attend_ranked(*arguments, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"newest": True},
        {"union": "layer"},
        {"group_scores": "max"},
        {"all_pages": True},
        {"no_rows": True},
        {"count": 0},
        {"count": None, "mass": 0.0},
        {"all_rows": np.array([True, False])},
    ],
)
def test_what_no_ranked_pass_can_say_runs_on_operators(change: dict[str, Any]) -> None:
    rule = Rule(reference=np.zeros((2, 4, 6, 8), np.float32), count=2, budget=8)
    assert isinstance(rule.ranked, RankedPass)
    assert replace(rule, **change).ranked is None


@dataclass(frozen=True)
class MovedRows(RulePolicy):
    name: ClassVar[str] = "moved-rows"

    def rule(self, inputs: PassInputs[RuleMemory]) -> Rule:
        kept = None if inputs.memory is None else inputs.memory.reference
        return Rule(all_rows=inputs.restarts, reference=kept, count=2, pages=3, keep="queries")


class KeepsTheFirstPage(Quest):
    """Answers one question by itself."""

    def select_pages(self, inputs: PassInputs[Any], active: Any) -> Any:
        chosen = super().select_pages(inputs, active)
        chosen.mask[..., 0] = True
        return chosen


def test_a_policy_of_ten_lines_runs_fused() -> None:
    fused = Ranking()
    for _, memory in denoise(MovedRows(), make_block(3), fused):
        active = memory.active
    assert active.sum(axis=1).tolist() == [2, 2]
    assert len(fused.asked) == 4


@pytest.mark.parametrize("policy", [KeepsTheFirstPage(budget=8), get_policy("mage:budget=8,dense_layers=0")])
def test_an_answer_of_its_own_is_asked_for(policy: Any) -> None:
    fused: Any = Ranking()
    assert isinstance(fused, Backend)
    masks = [memory.selection.mask for _, memory in denoise(policy, make_block(3), fused)]
    assert not fused.asked
    if isinstance(policy, KeepsTheFirstPage):
        assert all(mask[..., 0].all() for mask in masks)
