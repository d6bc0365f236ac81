"""Laws of many sequences, heads, rows and pages for what is fused or ranked: capacities end somewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn_conformance.cases import Case
from sparse_dlm_attn_conformance.checks import expect_same_bits
from sparse_dlm_attn_conformance.episodes import EXACT
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.strategies import cases, choice, integers, ranked_rules
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.tables import RankedRule
from sparse_dlm_attn_conformance.test_decisions import ranked as by_size
from sparse_dlm_attn_conformance.test_pass import test_attend_composes_its_four_operators as composes
from sparse_dlm_attn_conformance.test_pass import test_attend_is_one_softmax_over_context_and_block as one_softmax
from sparse_dlm_attn_conformance.test_ranked import expect_decided, run
from sparse_dlm_attn_conformance.test_ranked import test_a_rule_computes_what_the_operators_compute as computes

SMALL: dict[str, Any] = {"head_dims": (2, 4, 3), "page_sizes": (1, 2, 4, 3), "layouts": ("plain",)}
MANY_SEQUENCES = cases(**SMALL, batches=(4, 9, 5, 17, 33), blocks=(2, 3, 1), max_pages=3, regimes=EXACT)
MANY_HEADS = cases(
    **SMALL,
    max_batch=2,
    kv_heads=(9, 4, 5),
    groups=(2, 16, 8, 5),
    blocks=(8, 13, 5),
    max_pages=3,
    regimes=("dyadic", "ties"),
)
MANY_PAGES = cases(**{**SMALL, "page_sizes": (1, 2)}, max_batch=2, min_pages=65, max_pages=300, regimes=EXACT)
LONG_BLOCKS = cases(**SMALL, max_batch=2, blocks=(130, 33, 65, 129), max_pages=4, max_elements=4096, regimes=EXACT)


def expect_pass(subject: Subject, case: Case) -> None:
    """Check a fused pass, without and with what earlier passes left."""
    one_softmax.body(subject, case)
    composes.body(subject, case)


def expect_ranked(subject: Subject, case: Case, rule: RankedRule) -> None:
    """Check what a ranked pass decides and computes."""
    arrays = case.arrays(subject.dtype)
    expect_decided(run(subject, arrays, rule), arrays, rule)
    computes.body(subject, case, rule)


@pytest.mark.clause("ATTEND-4", "REUSE-1", "MERGE-1", "BLOCK-1")
@law(case=MANY_SEQUENCES, share=0.4)
def test_a_pass_of_many_sequences(subject: Subject, case: Case) -> None:
    expect_pass(subject, case)


@pytest.mark.clause("ATTEND-4", "REUSE-1", "MERGE-1", "BLOCK-1")
@law(case=MANY_HEADS, share=0.4)
def test_a_pass_of_many_heads(subject: Subject, case: Case) -> None:
    expect_pass(subject, case)


@pytest.mark.clause("RANKED-1", "CHANGE-2", "CHANGE-3")
@law(case=MANY_SEQUENCES, rule=ranked_rules(), share=0.4)
def test_a_ranked_pass_of_many_sequences(subject: Subject, case: Case, rule: RankedRule) -> None:
    expect_ranked(subject, case, rule)


@pytest.mark.clause("RANKED-1", "CHANGE-2", "CHANGE-3")
@law(case=MANY_HEADS, rule=ranked_rules(), share=0.4)
def test_a_ranked_pass_of_many_heads(subject: Subject, case: Case, rule: RankedRule) -> None:
    expect_ranked(subject, case, rule)


@pytest.mark.clause("RANKED-1", "TOP-1", "TOP-2")
@law(case=MANY_PAGES, rule=ranked_rules(), share=0.2)
def test_a_ranked_pass_of_many_pages(subject: Subject, case: Case, rule: RankedRule) -> None:
    expect_ranked(subject, case, rule)


@pytest.mark.clause("RANKED-1", "CHANGE-2", "CHANGE-3")
@law(case=LONG_BLOCKS, rule=ranked_rules(), share=0.3)
def test_a_ranked_pass_of_many_rows(subject: Subject, case: Case, rule: RankedRule) -> None:
    expect_ranked(subject, case, rule)


@pytest.mark.clause("TOP-1", "TOP-2", "TOP-3")
@law(
    pages=choice((65, 130, 300, 1025)), count=choice((64, 1, 7, 65, 129, 257, 2000)),
    batch=choice((1, 2, 5, 17)), seed=integers(0, 999), one_dtype=True, share=0.5,
)  # fmt: skip
def test_the_best_of_many_pages(subject: Subject, pages: int, count: int, batch: int, seed: int) -> None:
    """With ties everywhere, and some pages that may not be chosen."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-40, 40, (batch, 1, 2, pages)).astype(np.float64)
    eligible = rng.random((batch, 1, 1, pages)) < 0.8
    wanted = np.zeros(scores.shape, dtype=bool)
    for position in np.ndindex(*scores.shape[:-1]):
        listed = np.flatnonzero(eligible[position[0], 0, 0])
        wanted[position][listed[np.lexsort((listed, -scores[position][listed]))][:count]] = True
    chosen = subject.backend.top_pages(subject.floats(scores, "float32"), count, eligible=subject.ints(eligible))
    expect_same_bits(host(chosen), wanted, f"the {count} best of {pages} pages", "TOP-2")


@pytest.mark.clause("CHANGE-2", "CHANGE-3")
@law(
    tokens=choice((33, 65, 130, 300)), batch=choice((1, 2, 5, 17)),
    share_of_rows=choice((0.5, 0.1, 0.9, 1.0)), seed=integers(0, 999), one_dtype=True, share=0.5,
)  # fmt: skip
def test_the_largest_of_many_changes(
    subject: Subject, tokens: int, batch: int, share_of_rows: float, seed: int
) -> None:
    longest = subject.backend.capabilities.max_block_length
    tokens = tokens if longest is None else min(tokens, longest)
    changes = np.random.default_rng(seed).integers(0, 64, (batch, tokens)).astype(np.float64)
    count = round(share_of_rows * tokens)
    by_count, by_mass = np.zeros((2, batch, tokens), dtype=bool)
    for b, row in enumerate(changes):
        order = np.asarray(by_size(row))
        by_count[b, order[:count]] = True
        reached = np.concatenate([[0.0], np.cumsum(row[order])[:-1]])
        by_mass[b, order[reached < share_of_rows * row.sum()]] = True
    given = subject.floats(changes, "float32")
    got = host(subject.backend.largest_changes(given, count=count))
    expect_same_bits(got, by_count, f"the {count} largest of {tokens} changes", "CHANGE-2")
    got = host(subject.backend.largest_changes(given, mass=share_of_rows))
    expect_same_bits(got, by_mass, f"{share_of_rows:g} of the sum of {tokens} changes", "CHANGE-3")
