"""Laws of merge and reuse: the algebra of attention states."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState
from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import Arrays, Case, Host, round_to
from sparse_dlm_attn_conformance.checks import expect, expect_close, expect_same_bits, expect_same_state, expect_state
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.oracle import context_keys
from sparse_dlm_attn_conformance.strategies import cases, merge_tables
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.tables import HostState, MergeTable


def merged_on_host(states: list[HostState]) -> HostState:
    """Merge in float64, straight from the definition (clauses MERGE-1 to MERGE-4)."""
    lse = np.stack([state.lse for state in states])
    peak = lse.max(axis=0)
    shift = np.where(np.isneginf(peak), 0.0, peak)
    weights = np.exp(lse - shift)
    total = weights.sum(axis=0)
    share = weights / np.where(total == 0, 1.0, total)
    out = sum(
        np.where(part[..., None] == 0, 0.0, part[..., None] * state.out)
        for part, state in zip(share, states, strict=True)
    )
    with np.errstate(divide="ignore"):
        return HostState(np.asarray(out), np.where(total == 0, -np.inf, shift + np.log(total)))


def merge(subject: Subject, states: list[HostState]) -> tuple[Host, Host]:
    merged = subject.backend.merge(*(subject.state(state) for state in states))
    return expect_state(subject, merged, "merge", states[0].out.shape)


def expect_merged(subject: Subject, states: list[HostState], got: tuple[Host, Host], clause: str) -> None:
    expected = merged_on_host(states)
    out_budget, lse_budget = accuracy.merge_budget(subject.dtype, states)
    expect_close(got[1], expected.lse, lse_budget, "lse of merge", clause)
    expect_close(got[0], expected.out, out_budget, "out of merge", clause)


@pytest.mark.clause("MERGE-1", "STATE-4")
@law(table=merge_tables())
def test_merge_is_the_logsumexp_weighted_mean(subject: Subject, table: MergeTable) -> None:
    states = table.states(subject.dtype)
    expect_merged(subject, states, merge(subject, states), "MERGE-1")


@pytest.mark.clause("MERGE-1")
@law(table=merge_tables(states=(3, 4, 8, 17, 33), empty=False), share=0.5)
def test_every_state_counts(subject: Subject, table: MergeTable) -> None:
    """A part that is dropped or counted twice moves the lse by more than any rounding."""
    states = [HostState(state.out + i, np.zeros_like(state.lse)) for i, state in enumerate(table.states("float32"))]
    states = [HostState(round_to(state.out, subject.dtype), state.lse) for state in states]
    expect_merged(subject, states, merge(subject, states), "MERGE-1")


@pytest.mark.clause("MERGE-2")
@law(table=merge_tables(states=(2, 3)), share=0.5)
def test_merge_is_commutative(subject: Subject, table: MergeTable) -> None:
    states = table.states(subject.dtype)
    first = merge(subject, states)
    out_budget, lse_budget = accuracy.merge_budget(subject.dtype, states)
    for order in itertools.permutations(range(len(states))):
        out, lse = merge(subject, [states[i] for i in order])
        expect_close(lse, first[1], 2 * lse_budget, f"lse of merge in order {order}", "MERGE-2")
        expect_close(out, first[0], 2 * out_budget, f"out of merge in order {order}", "MERGE-2")


@pytest.mark.clause("MERGE-2")
@law(table=merge_tables(states=(3, 4)), share=0.5)
def test_merge_is_associative(subject: Subject, table: MergeTable) -> None:
    hosts = table.states(subject.dtype)
    states = [subject.state(state) for state in hosts]
    ops = subject.backend
    together = ops.merge(*states)
    left = ops.merge(ops.merge(*states[:2]), *states[2:])
    right = ops.merge(states[0], ops.merge(*states[1:]))
    out_budget, lse_budget = accuracy.merge_budget(subject.dtype, hosts)
    # An intermediate lse is rounded to float32, which weights the outputs a little differently.
    scale = np.max([np.abs(state.out).max(axis=3) for state in hosts], axis=0)[..., None]
    out_budget = 2 * out_budget + 2 * lse_budget[..., None] * scale
    for name, nested in (("left", left), ("right", right)):
        expect_close(host(nested.lse), host(together.lse), 4 * lse_budget, f"lse nested {name}", "MERGE-2")
        expect_close(host(nested.out), host(together.out), out_budget, f"out nested {name}", "MERGE-2")


@pytest.mark.clause("MERGE-3", "STATE-2")
@law(table=merge_tables(states=(1,)))
def test_the_empty_state_is_the_identity(subject: Subject, table: MergeTable) -> None:
    state = table.states(subject.dtype)[0]
    empty = HostState(np.zeros_like(state.out), np.full_like(state.lse, -np.inf))
    out_budget, lse_budget = accuracy.merge_budget(subject.dtype, [state])
    for parts in ([state], [state, empty], [empty, state], [empty, state, empty]):
        out, lse = merge(subject, parts)
        expect_close(lse, state.lse, lse_budget, "lse merged with nothing", "MERGE-3")
        expect_close(out, state.out, out_budget, "out merged with nothing", "MERGE-3")


@pytest.mark.clause("MERGE-3", "STATE-2")
@law(table=merge_tables(), share=0.3)
def test_merging_empty_states_gives_the_empty_state(subject: Subject, table: MergeTable) -> None:
    states = [HostState(np.zeros_like(s.out), np.full_like(s.lse, -np.inf)) for s in table.states(subject.dtype)]
    out, lse = merge(subject, states)
    expect((out == 0).all(), "MERGE-3", "the merge of empty states must have out 0 exactly, and no NaN")
    expect(np.isneginf(lse).all(), "MERGE-3", "the merge of empty states must have lse -inf")


@pytest.mark.clause("MERGE-4")
@law(table=merge_tables(states=(2, 3), empty=False), share=0.7)
def test_the_out_of_a_state_without_weight_may_hold_anything(subject: Subject, table: MergeTable) -> None:
    states = table.states(subject.dtype)
    dropped = table.seed % len(states)
    for value, level in ((np.nan, -np.inf), (np.inf, -np.inf), (-np.inf, -2e5)):
        # exp(-1e5) is 0 in every precision: that weight is 0 as well, although its lse is finite
        poisoned = list(states)
        shape = states[dropped].lse.shape
        poisoned[dropped] = HostState(np.full_like(states[dropped].out, value), np.full(shape, level))
        out, lse = merge(subject, poisoned)
        expect_merged(subject, [s for i, s in enumerate(states) if i != dropped], (out, lse), "MERGE-4")


@pytest.mark.clause("MERGE-4")
@law(table=merge_tables(states=(2, 3), empty=False), share=0.7)
def test_nan_that_has_weight_shows(subject: Subject, table: MergeTable) -> None:
    states = [HostState(s.out, s.lse - s.lse) for s in table.states(subject.dtype)]
    chosen = table.seed % len(states)
    where: Host = np.asarray(np.random.default_rng(table.seed).random(states[0].out.shape) < 0.3)
    for name in ("out", "lse"):
        poisoned = list(states)
        rows = np.asarray(where.any(axis=3))
        if name == "out":
            poisoned[chosen] = HostState(np.where(where, np.nan, states[chosen].out), states[chosen].lse)
        else:
            poisoned[chosen] = HostState(states[chosen].out, np.where(rows, np.nan, states[chosen].lse))
        out, lse = merge(subject, poisoned)
        if name == "out":
            expect_same_bits(np.isnan(out), where, "the places of NaN after a merge", "MERGE-4")
            expect(not np.isnan(lse).any(), "MERGE-4", "NaN in out must not reach the lse")
        else:
            text = "a NaN lse must show in out and lse of its row"
            expect(np.isnan(out[rows]).all() and np.isnan(lse[rows]).all(), "MERGE-4", text)
            expect(not np.isnan(out[~rows]).any(), "MERGE-4", "a NaN lse must stay in its row")


@pytest.mark.clause("MERGE-1", "CONTEXT-5")
@law(case=cases(min_pages=2, heads=("one", "kv")), share=0.7)
def test_any_partition_into_pages_merges_to_the_same_state(subject: Subject, case: Case, arrays: Arrays) -> None:
    parts = np.random.default_rng(case.seed).integers(0, 3, case.pages)
    states = []
    for part in range(3):
        states.append(attend(subject, arrays.but(mask=arrays.mask & (parts == part))))
    merged = subject.backend.merge(*states)
    expected = accuracy.attention(arrays, context_keys(arrays), rounded_parts=3)
    out, lse = expect_state(subject, merged, "merge", arrays.q.shape)
    expect_close(lse, expected.state.lse, 2 * expected.lse_budget, "lse of the parts", "MERGE-1")
    expect_close(out, expected.state.out, 2 * expected.out_budget, "out of the parts", "MERGE-1")


def attend(subject: Subject, arrays: Arrays) -> AttentionState:
    on = subject.load(arrays)
    return subject.backend.attend_pages(on.q, on.context, on.selection, on.active, scale=arrays.scale)


@pytest.mark.clause("REUSE-1")
@law(table=merge_tables(states=(2,)))
def test_reuse_copies_the_bits_of_each_row(subject: Subject, table: MergeTable) -> None:
    fresh, cached = table.states(subject.dtype)
    rows = np.random.default_rng(table.seed).integers(0, 2, (table.batch, table.tokens)).astype(bool)
    for active in (rows, ~rows, np.ones_like(rows), np.zeros_like(rows)):
        state = subject.backend.reuse(subject.ints(active), subject.state(fresh), subject.state(cached))
        out, lse = expect_state(subject, state, "reuse", fresh.out.shape)
        chosen = active[:, None, :]
        expect_same_bits(
            out.astype(np.float64), np.where(chosen[..., None], fresh.out, cached.out), "out of reuse", "REUSE-1"
        )
        expect_same_bits(lse.astype(np.float64), np.where(chosen, fresh.lse, cached.lse), "lse of reuse", "REUSE-1")


@pytest.mark.clause("REUSE-1")
@law(table=merge_tables(states=(1,), empty=False), share=0.3)
def test_reuse_does_not_mix_in_rows_that_were_not_chosen(subject: Subject, table: MergeTable) -> None:
    state = table.states(subject.dtype)[0]
    rotten = HostState(np.full_like(state.out, np.nan), np.full_like(state.lse, np.nan))
    everyone = np.ones((table.batch, table.tokens), dtype=bool)
    for active, fresh, cached in ((everyone, state, rotten), (~everyone, rotten, state)):
        kept = subject.backend.reuse(subject.ints(active), subject.state(fresh), subject.state(cached))
        expect_same_state(kept, subject.state(state), "reuse beside NaN", "REUSE-1")


@pytest.mark.clause("MERGE-1", "REUSE-1", "CONTEXT-1")
@law(table=merge_tables(states=(2, 3)), share=0.5)
def test_strides_of_states_are_free(subject: Subject, table: MergeTable) -> None:
    """Kernels hand out states in token-major memory, or as rows of something larger."""
    states = table.states(subject.dtype)
    active = np.random.default_rng(table.seed).integers(0, 2, (table.batch, table.tokens)).astype(bool)
    for layout in ("token_major", "gapped"):
        laid = [subject.state(state, layout) for state in states]
        got = expect_state(subject, subject.backend.merge(*laid), "merge", states[0].out.shape)
        expect_merged(subject, states, got, "MERGE-1")
        rows = subject.ints(active, gapped=layout == "gapped")
        expect_same_state(
            subject.backend.reuse(rows, *laid[:2]),
            subject.backend.reuse(subject.ints(active), *(subject.state(state) for state in states[:2])),
            f"reuse of {layout} states",
            "REUSE-1",
        )
