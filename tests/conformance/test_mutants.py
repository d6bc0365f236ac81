"""The suite finds every broken backend and policy, by a law whose clause names the mistake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mutants_attention
import mutants_memory
import mutants_methods
import mutants_operators
import mutants_passes
import mutants_policies
import mutants_reading
import mutants_states
import pytest
from mutation import MUTANTS

from sparse_dlm_attn import Backend
from sparse_dlm_attn_conformance import check_backend
from sparse_dlm_attn_conformance.operations import OPERATORS

TABLES = (  # importing them fills MUTANTS
    mutants_attention,
    mutants_memory,
    mutants_methods,
    mutants_operators,
    mutants_passes,
    mutants_policies,
    mutants_reading,
    mutants_states,
)


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_mistake_is_found_by_a_law_of_its_clause(name: str) -> None:
    mutant = MUTANTS[name]
    of_policy = not isinstance(mutant.subject, Backend)
    backend, policies = ("reference", (mutant.subject,)) if of_policy else (mutant.subject, ())
    for profile in ("few", "ci"):  # most die on the first problems; other laws of their clauses need not run long
        found = check_backend(
            backend,
            clauses=mutant.clauses,
            dtypes=mutant.dtypes,
            policies=policies,
            profile=profile,
            first_only=True,
            shrink=False,
        )
        if found:
            break
    assert found, f"{name} survives every law of {', '.join(mutant.clauses)}"
    assert set(found[0].clauses) & set(mutant.clauses)
    assert "no argument of the replaced method" not in found[0].text, "the mistake itself is broken"


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


def test_there_are_mistakes_in_every_operator() -> None:
    assert {mutant.method for mutant in MUTANTS.values()} >= set(OPERATORS) | {"why_not", "asarray"}
    assert len(MUTANTS) >= 322
