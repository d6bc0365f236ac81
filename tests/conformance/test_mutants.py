"""The suite finds every broken backend and policy, by a law whose clause names the mistake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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


def test_a_backend_that_follows_settings_of_the_process_is_found() -> None:
    torch = pytest.importorskip("torch")
    from sparse_dlm_attn_torch import TorchBackend

    class InTheDefaultDtype(TorchBackend):
        def query_change(self, q: Any, q_reference: Any) -> Any:
            return super().query_change(q, q_reference).to(torch.get_default_dtype())

    class OnTheDefaultDevice(TorchBackend):
        def attend_block(self, q: Any, k: Any, v: Any, *, scale: float | None = None) -> Any:
            state = super().attend_block(q, k, v, scale=scale)
            return replace(state, out=state.out + torch.zeros(1, dtype=q.dtype))

    for backend in (InTheDefaultDtype(), OnTheDefaultDevice()):
        (found,) = check_backend(
            backend, clauses=("PURE-6",), dtypes=("float32",), profile="ci", first_only=True, shrink=False
        )
        assert found.clauses == ("PURE-6",)


def test_there_are_mutants_of_every_operator() -> None:
    changed = {next(iter(set(vars(type(m.backend))) & OPERATORS), "") for m in mutants.BACKENDS.values()}
    assert changed >= OPERATORS
    assert len(mutants.BACKENDS) + len(policy_mutants.POLICIES) >= 220


OPERATORS = {
    "page_bounds", "extend_bounds", "page_scores", "pooled_scores", "top_pages", "query_change",
    "largest_changes", "attend_pages", "attend_block", "merge", "reuse", "attend", "attend_ranked",
    "why_not", "asarray",
}  # fmt: skip
