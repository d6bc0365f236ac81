"""Backends of four plain functions and the inherited operators conform, on three array libraries."""

from __future__ import annotations

import pytest
from plain_backends import DefaultOperators, SplitKeys, StrictOperators, TorchOperators

from sparse_dlm_attn import Backend
from sparse_dlm_attn_conformance import Case, check_backend, reproduce

OPERATORS = "STATE BOUNDS SCORES POOLED TOP CHANGE ATTEND BLOCK MERGE REUSE RANKED PURE"


@pytest.mark.parametrize(
    ("kind", "library", "profile"),
    [
        (DefaultOperators, "numpy", "quick"),
        (TorchOperators, "torch", "few"),  # another library differs in its functions, not in what is drawn
        (StrictOperators, "array_api_strict", "few"),
    ],
)
def test_the_default_operators_conform(kind: type[Backend], library: str, profile: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    clauses = tuple(OPERATORS.split())
    assert check_backend(kind(), clauses=clauses, dtypes=("float32",), profile=profile) == []


@pytest.mark.parametrize(
    ("law", "case"),
    [
        (
            "test_attention::test_nan_in_a_key_shows_in_every_row_that_reads_it",
            Case(group=4, head_dim=64, lengths=((1, 1, 1),), table=((0, 1, 2),), num_pages=3, masks=(7,), scale=1.0),
        ),
        (
            "test_special_values::test_nan_in_the_block_shows_where_it_is_read",
            Case(head_dim=96, tokens=8, span=8, active=(255,), scale=1.0, seed=18),
        ),
    ],
)
def test_a_nan_value_whose_weight_underflows_may_be_dropped_with_its_part(law: str, case: Case) -> None:
    """Attention in two parts that the library's own merge joins: a part of weight 0 in float32 is dropped."""
    reproduce(SplitKeys(), law, dtype="float32", case=case)


def test_a_policy_conforms_on_another_array_library() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    found = check_backend(
        TorchOperators(), clauses=("POLICY-1", "POLICY-6"), dtypes=("float32",), policies=("losa:budget=4,active=2",)
    )
    assert found == []
