"""Laws of a whole fused pass: attend is its four operators in one."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState
from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import Arrays, Case, Host, round_to
from sparse_dlm_attn_conformance.checks import (
    expect,
    expect_array,
    expect_close,
    expect_same_bits,
    expect_state,
    expect_state_close,
)
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.oracle import COUNTS, block_keys, context_keys
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Loaded, Subject, host
from sparse_dlm_attn_conformance.tables import HostState


def cached_state(subject: Subject, arrays: Arrays, seed: int) -> tuple[HostState, AttentionState]:
    """Return a context state of earlier passes, on the host and on the backend."""
    rng = np.random.default_rng(seed + 1)
    empty = rng.random(arrays.q.shape[:3]) < 0.2
    out = np.where(empty[..., None], 0.0, rng.integers(-8, 9, arrays.q.shape) / 8.0)
    lse = np.where(empty, -np.inf, round_to(3.0 * rng.standard_normal(arrays.q.shape[:3]), "float32"))
    made = HostState(out, lse)
    return made, subject.state(made, arrays.layout)


@pytest.mark.clause("ATTEND-4", "MERGE-1")
@law(case=cases())
def test_attend_is_one_softmax_over_context_and_block(subject: Subject, arrays: Arrays, on: Loaded) -> None:
    out, state = fused(subject, arrays, on, None)
    context, block = context_keys(arrays), block_keys(arrays)
    expect_state_close(
        host(state.out), host(state.lse), accuracy.attention(arrays, context), "the context state of attend", "ATTEND-4"
    )
    expected = accuracy.attention(arrays, context.joined(block), rounded_parts=2)
    expect_close(host(out), expected.state.out, expected.out_budget, "out of attend", "ATTEND-4")


@pytest.mark.clause("ATTEND-4", "REUSE-1")
@law(case=cases())
def test_attend_composes_its_four_operators(subject: Subject, case: Case, arrays: Arrays, on: Loaded) -> None:
    given, cached = cached_state(subject, arrays, case.seed)
    out, state = fused(subject, arrays, on, cached)
    rows = np.broadcast_to(arrays.active[:, None, :], arrays.q.shape[:3])
    for name in ("out", "lse"):
        got, want = host(getattr(state, name)), host(getattr(cached, name))
        expect_same_bits(got[~rows], want[~rows], f"{name} of inactive rows, which keep what was cached", "ATTEND-4")
    fresh = accuracy.attention(arrays, context_keys(arrays))
    block = accuracy.attention(arrays, block_keys(arrays))
    merged, budget = merged_expectation(arrays, rows, given, fresh, block)
    expect_close(host(state.lse)[rows], fresh.state.lse[rows], fresh.lse_budget[rows], "lse of active rows", "ATTEND-4")
    expect_close(host(out), merged, budget, "out of attend", "ATTEND-4")


@pytest.mark.clause("ATTEND-4", "REUSE-1")
@law(case=cases(), share=0.5)
def test_what_is_cached_for_active_rows_is_not_read(subject: Subject, case: Case, arrays: Arrays, on: Loaded) -> None:
    given, cached = cached_state(subject, arrays, case.seed)
    rows = np.broadcast_to(arrays.active[:, None, :], arrays.q.shape[:3])
    rotten = subject.state(HostState(np.where(rows[..., None], np.nan, given.out), np.where(rows, np.nan, given.lse)))
    (clean, kept), (out, state) = (fused(subject, arrays, on, part) for part in (cached, rotten))
    expect_same_bits(host(out), host(clean), "out with NaN cached for active rows", "ATTEND-4")
    for name in ("out", "lse"):
        expect_same_bits(
            host(getattr(state, name)), host(getattr(kept, name)), f"{name} to be cached, likewise", "ATTEND-4"
        )


@pytest.mark.clause("ATTEND-4", "MERGE-4")
@law(case=cases(), share=0.5)
def test_a_cached_row_without_weight_may_hold_anything_and_nan_with_weight_shows(
    subject: Subject, case: Case, arrays: Arrays, on: Loaded
) -> None:
    """Memory of rows that were never computed has lse -inf, and an out that nobody wrote."""
    given, _ = cached_state(subject, arrays, case.seed)
    idle = np.broadcast_to(~arrays.active[:, None, :], arrays.q.shape[:3])
    empty = np.isneginf(given.lse)[..., None]
    clean = subject.state(HostState(np.where(empty, 0.0, given.out), given.lse))
    rotten = subject.state(HostState(np.where(empty, np.nan, given.out), given.lse))
    want, got = (host(fused(subject, arrays, on, cached)[0]) for cached in (clean, rotten))
    expect_same_bits(got, want, "out with NaN cached in rows of lse -inf", "MERGE-4")
    wrong = subject.state(HostState(np.where(empty, given.out, np.nan), given.lse))
    shown = host(fused(subject, arrays, on, wrong)[0])
    counts = given.lse > accuracy.attention(arrays, block_keys(arrays)).state.lse + np.log(COUNTS)
    expect(np.isnan(shown[idle & counts]).all(), "MERGE-4", "NaN in a cached row that counts must show")


def fused(subject: Subject, arrays: Arrays, on: Loaded, cached: AttentionState | None) -> tuple[object, AttentionState]:
    result = subject.backend.attend(on.q, on.k, on.v, on.context, on.selection, on.active, cached, scale=arrays.scale)
    text = f"attend must return (out, context_state); got {type(result).__qualname__}"
    expect(isinstance(result, tuple) and len(result) == 2, "ATTEND-4", text)
    out, state = result
    expect_array(subject, out, "out of attend", arrays.q.shape, subject.dtype, "STATE-4")
    expect_state(subject, state, "the context state of attend", arrays.q.shape)
    return out, state


def merged_expectation(
    arrays: Arrays, rows: Host, given: HostState, fresh: accuracy.Expected, block: accuracy.Expected
) -> tuple[Host, Host]:
    """Return the float64 merge of reused context and block, and the budget that is left for it."""
    out = np.where(rows[..., None], fresh.state.out, given.out)
    lse = np.where(rows, fresh.state.lse, given.lse)
    peak = np.maximum(lse, block.state.lse)
    weights = [np.exp(part - peak) for part in (lse, block.state.lse)]
    total = sum(weights)
    merged = (weights[0][..., None] * out + weights[1][..., None] * block.state.out) / total[..., None]
    largest = np.maximum(np.abs(out).max(axis=3), np.abs(block.state.out).max(axis=3))[..., None]
    logs = np.where(rows, fresh.lse_budget, 0.0) + block.lse_budget
    parts = np.where(rows[..., None], fresh.out_budget, 0.0) + block.out_budget
    rounding = 2 * 3 * accuracy.EPS[arrays.dtype] * largest
    return merged, parts + rounding + 2 * logs[..., None] * largest


@pytest.mark.clause("ATTEND-4", "ATTEND-2", "STATE-2")
@law(case=cases(), share=0.5)
def test_without_context_attend_is_the_block_alone(subject: Subject, arrays: Arrays) -> None:
    arrays = arrays.but(mask=np.zeros_like(arrays.mask))
    on = subject.load(arrays)
    out, state = fused(subject, arrays, on, None)
    expected = accuracy.attention(arrays, block_keys(arrays), rounded_parts=1)
    expect_close(host(out), expected.state.out, expected.out_budget, "out without context", "ATTEND-4")
    expect(np.isneginf(host(state.lse)).all(), "STATE-2", "the context state must be empty")
