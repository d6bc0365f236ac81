"""The suite finds every broken backend and policy, by a law whose clause names the mistake."""

from __future__ import annotations

import mutants
import policy_mutants
import pytest

from sparse_dlm_attn_conformance.programmatic import check_backend


@pytest.mark.parametrize("name", list(mutants.BACKENDS))
def test_a_broken_backend_is_found(name: str) -> None:
    mutant = mutants.BACKENDS[name]
    found = check_backend(
        mutant.backend,
        clauses=mutant.clauses,
        dtypes=mutant.dtypes,
        profile="ci",
        first_only=True,
        shrink=False,
    )
    assert found, f"{name} survives every law of {', '.join(mutant.clauses)}"
    assert set(found[0].clauses) & set(mutant.clauses)


@pytest.mark.parametrize("name", list(policy_mutants.POLICIES))
def test_a_broken_policy_is_found(name: str) -> None:
    mutant = policy_mutants.POLICIES[name]
    found = check_backend(
        "reference",
        clauses=mutant.clauses,
        dtypes=("float32",),
        policies=(mutant.policy,),
        profile="ci",
        first_only=True,
        shrink=False,
    )
    assert found, f"{name} survives every law of {', '.join(mutant.clauses)}"
    assert set(found[0].clauses) & set(mutant.clauses)


def test_there_are_mutants_of_every_operator() -> None:
    changed = {next(iter(set(vars(type(m.backend))) & OPERATORS), "") for m in mutants.BACKENDS.values()}
    assert changed >= OPERATORS
    assert len(mutants.BACKENDS) + len(policy_mutants.POLICIES) >= 220


OPERATORS = {
    "page_bounds", "extend_bounds", "page_scores", "pooled_scores", "top_pages", "query_change",
    "largest_changes", "attend_pages", "attend_block", "merge", "reuse", "attend", "attend_ranked",
    "why_not", "asarray",
}  # fmt: skip
