"""Pooled scores from a known LSE, which a policy has at hand after a dense pass."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import Arrays, Case, Host
from sparse_dlm_attn_conformance.checks import expect, expect_close
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.oracle import context_keys, page_mass
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Subject, host


def everything(arrays: Arrays) -> Host:
    """Return every existing page for every row."""
    exists = (arrays.page_lengths > 0)[:, None, None, :]
    return np.broadcast_to(exists, (*arrays.q.shape[:3], arrays.page_lengths.shape[1]))


def pooled(subject: Subject, arrays: Arrays, lse: Host) -> Host:
    on = subject.load(arrays)
    known = subject.floats(lse, "float32")
    return host(subject.backend.pooled_scores(on.q, on.context, span=arrays.span, scale=arrays.scale, lse=known))


@pytest.mark.clause("POOLED-3", "POOLED-1")
@law(case=cases())
def test_a_known_lse_gives_the_same_masses(subject: Subject, case: Case) -> None:
    arrays = case.arrays(subject.dtype)
    keys = context_keys(arrays, everything(arrays))
    lse = accuracy.attention(arrays, keys).state.lse
    got = pooled(subject, arrays, lse)
    # A float32 LSE is off by half its last place, which scales every mass of its row.
    finite = np.where(np.isfinite(lse), np.abs(lse), 0.0)
    slack = accuracy.EPS["float32"] * finite.max(initial=0.0)
    budget = accuracy.pooled_budget(arrays, keys) + slack
    expect_close(got, page_mass(arrays, arrays.span), budget, "pooled_scores(lse=)", "POOLED-3")


@pytest.mark.clause("POOLED-3")
@law(case=cases(), share=0.5)
def test_an_lse_over_more_keys_gives_shares_of_it(subject: Subject, case: Case) -> None:
    arrays = case.arrays(subject.dtype)
    lse = accuracy.attention(arrays, context_keys(arrays, everything(arrays))).state.lse
    whole = pooled(subject, arrays, lse).astype(np.float64)
    twice = pooled(subject, arrays, lse + np.log(2.0)).astype(np.float64)
    # Half of a mass is exact; the LSE rounds once more.
    limit = 1e-6 + accuracy.EPS["float32"] * np.abs(np.where(np.isfinite(lse), lse, 0.0)).max(initial=0.0)
    expect_close(twice, whole / 2, 4 * limit, "pooled_scores of an LSE over twice the mass", "POOLED-3")


@pytest.mark.clause("POOLED-3")
@law(case=cases(), share=0.5)
def test_an_lse_that_is_too_small_gives_no_score_above_1(subject: Subject, case: Case) -> None:
    arrays = case.arrays(subject.dtype)
    lse = accuracy.attention(arrays, context_keys(arrays, everything(arrays))).state.lse
    for missing in (3.0, 500.0):
        scores = pooled(subject, arrays, lse - missing)
        # A mean of ones may round; NaN of infinite keys is not meant.
        largest = scores.max(initial=0.0)
        expect(
            not (scores > 1 + 2 * accuracy.EPS["float32"]).any(),
            "POOLED-3",
            f"pooled_scores of an LSE that is {missing} too small must not exceed 1; got {largest}",
        )
