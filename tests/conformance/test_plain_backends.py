"""Backends of four plain functions and the inherited operators conform, on three array libraries."""

from __future__ import annotations

import pytest
from plain_backends import DefaultOperators, StrictOperators, TorchOperators

from sparse_dlm_attn import Backend
from sparse_dlm_attn_conformance.programmatic import check_backend

OPERATORS = (
    "STATE",
    "BOUNDS",
    "SCORES",
    "POOLED",
    "TOP",
    "CHANGE",
    "ATTEND",
    "BLOCK",
    "MERGE",
    "REUSE",
    "RANKED",
    "PURE",
)


@pytest.mark.parametrize(
    ("kind", "library"),
    [(DefaultOperators, "numpy"), (TorchOperators, "torch"), (StrictOperators, "array_api_strict")],
)
def test_the_default_operators_conform(kind: type[Backend], library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    assert check_backend(kind(), clauses=OPERATORS, dtypes=("float32",)) == []


def test_a_policy_conforms_on_another_array_library() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    found = check_backend(
        TorchOperators(),
        clauses=("POLICY-1", "POLICY-6"),
        dtypes=("float32",),
        policies=("losa:budget=4,active=2",),
    )
    assert found == []
