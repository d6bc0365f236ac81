"""Laws of attention over pages, within the block, and of a whole fused pass."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState
from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import EXACT, Arrays, Case, Host, round_to
from sparse_dlm_attn_conformance.checks import (
    expect,
    expect_alike,
    expect_close,
    expect_same_bits,
    expect_same_state,
    expect_state,
    expect_state_close,
)
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.oracle import COUNTS, block_keys, context_keys, scale_of, weights
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Loaded, Subject, host
from sparse_dlm_attn_conformance.tables import HostState
from sparse_dlm_attn_reference import ReferenceBackend


def attend(subject: Subject, arrays: Arrays, loaded: Loaded | None = None) -> AttentionState:
    """Run `attend_pages` on the backend under test."""
    on = loaded or subject.load(arrays)
    state = subject.backend.attend_pages(on.q, on.context, on.selection, on.active, scale=arrays.scale)
    expect_state(subject, state, "attend_pages", arrays.q.shape)
    return state


def close_to_oracle(subject: Subject, arrays: Arrays, state: AttentionState, clause: str, what: str) -> None:
    out, lse = expect_state(subject, state, what, arrays.q.shape)
    expect_state_close(out, lse, accuracy.attention(arrays, context_keys(arrays)), what, clause)


@pytest.mark.clause("ATTEND-1", "ACCURACY-2", "STATE-1", "STATE-3", "GQA-1", "SELECTION-1")
@law(case=cases())
def test_attend_pages_equals_one_masked_softmax(subject: Subject, arrays: Arrays) -> None:
    close_to_oracle(subject, arrays, attend(subject, arrays), "ATTEND-1", "attend_pages")


@pytest.mark.clause("ATTEND-1", "ACCURACY-2", "STATE-1", "CONTEXT-1")
@law(case=cases())
def test_attend_pages_equals_the_reference(subject: Subject, arrays: Arrays) -> None:
    state = attend(subject, arrays)
    reference = ReferenceBackend().attend_pages(
        arrays.q, arrays.context(), arrays.selection(), arrays.active, scale=arrays.scale
    )
    budget = accuracy.attention(arrays, context_keys(arrays))
    expected = replace(budget, state=HostState(reference.out, reference.lse))
    expect_state_close(host(state.out), host(state.lse), expected, "attend_pages", "ATTEND-1")


@pytest.mark.clause("STATE-4")
@law(case=cases(), share=0.3)
def test_out_has_the_dtype_of_the_inputs_and_lse_is_float32(
    subject: Subject, case: Case, arrays: Arrays, on: Loaded
) -> None:
    attend(subject, arrays, on)
    block = subject.backend.attend_block(on.q, on.k, on.v, scale=case.scale)
    expect_state(subject, block, "attend_block", arrays.q.shape)
    expect_state(subject, subject.backend.merge(block, block), "merge", arrays.q.shape)


@pytest.mark.clause("STATE-2")
@law(case=cases(), share=0.5)
def test_rows_without_a_key_get_out_0_and_lse_minus_inf(subject: Subject, arrays: Arrays) -> None:
    on = subject.load(arrays.but(mask=np.zeros_like(arrays.mask)))
    state = attend(subject, arrays, on)
    expect((host(state.out) == 0).all(), "STATE-2", "a row without a key must have out 0 exactly")
    expect(np.isneginf(host(state.lse)).all(), "STATE-2", "a row without a key must have lse -inf")


@pytest.mark.clause("STATE-1")
@law(case=cases(regimes=("generic", "dyadic"), min_pages=1, poisons=("zero",)), share=0.5)
def test_lse_of_n_equal_keys_is_the_score_plus_the_natural_log_of_n(subject: Subject, arrays: Arrays) -> None:
    key = arrays.k_pages[:1, :, :1]
    same = arrays.but(k_pages=np.where(arrays.stored()[..., None], np.nan_to_num(key), arrays.k_pages))
    state = attend(subject, same)
    scores = np.einsum("bhtd,hd->bht", arrays.q, np.repeat(np.nan_to_num(key)[0, :, 0], arrays.group, axis=0))
    count = (arrays.rows() * arrays.page_lengths[:, None, None, :]).sum(axis=3)
    with np.errstate(divide="ignore"):
        expected = np.where(count > 0, scale_of(arrays) * scores + np.log(count), -np.inf)
    budget = accuracy.attention(same, context_keys(same)).lse_budget
    expect_close(host(state.lse), expected, budget, "lse of equal keys", "STATE-1")


@pytest.mark.clause("STATE-3")
@law(case=cases(regimes=("dyadic", "generic"), scales=(None,)), share=0.5)
def test_the_default_scale_is_one_over_the_root_of_head_dim(
    subject: Subject, case: Case, arrays: Arrays, on: Loaded
) -> None:
    explicit = arrays.but(scale=1.0 / math.sqrt(case.head_dim))
    what = "attend_pages with the default scale, and with the same scale given"
    expect_same_state(attend(subject, arrays, on), attend(subject, explicit, on), what, "STATE-3")
    blocks = [subject.backend.attend_block(on.q, on.k, on.v, scale=scale) for scale in (None, explicit.scale)]
    expect_same_state(blocks[0], blocks[1], "attend_block with the default scale, and given", "STATE-3")


@pytest.mark.clause("STATE-3")
@law(case=cases(regimes=("dyadic",), scales=(1.0, 0.25)), share=0.3)
def test_doubling_the_scale_is_doubling_the_queries(subject: Subject, case: Case, arrays: Arrays) -> None:
    twice = arrays.but(scale=2 * (case.scale or 1.0))
    expected = accuracy.attention(twice, context_keys(twice))
    for name, problem in (("scale", twice), ("queries", arrays.but(q=2 * arrays.q))):
        out, lse = expect_state(subject, attend(subject, problem), "attend_pages", arrays.q.shape)
        expect_state_close(out, lse, expected, f"attend_pages with doubled {name}", "STATE-3")


@pytest.mark.clause("ATTEND-2")
@law(case=cases())
def test_inactive_rows_get_out_0_and_lse_minus_inf(subject: Subject, arrays: Arrays) -> None:
    state = attend(subject, arrays)
    idle = np.broadcast_to(~arrays.active[:, None, :], arrays.q.shape[:3])
    expect((host(state.out)[idle] == 0).all(), "ATTEND-2", "inactive rows must have out 0")
    expect(np.isneginf(host(state.lse)[idle]).all(), "ATTEND-2", "inactive rows must have lse -inf")


@pytest.mark.clause("ATTEND-2")
@law(case=cases(), share=0.5)
def test_queries_of_inactive_rows_are_not_read(subject: Subject, arrays: Arrays) -> None:
    poisoned = arrays.but(q=np.where(arrays.active[:, None, :, None], arrays.q, np.nan))
    expect_same_state(
        attend(subject, poisoned), attend(subject, arrays), "attend_pages with NaN queries in inactive rows", "ATTEND-2"
    )


@pytest.mark.clause("ATTEND-3")
@law(case=cases())
def test_pages_that_nobody_selected_are_not_read(subject: Subject, arrays: Arrays) -> None:
    poisoned = arrays.poisoned(~arrays.stored(arrays.loaded()), np.nan)
    what = "attend_pages with NaN in pages that nobody selected"
    expect_same_state(attend(subject, poisoned), attend(subject, arrays), what, "ATTEND-3")


@pytest.mark.clause("ATTEND-3", "SELECTION-1")
@law(case=cases(regimes=EXACT, min_pages=2), share=0.7)
def test_a_page_changes_only_the_rows_that_selected_it(subject: Subject, case: Case, arrays: Arrays) -> None:
    page = case.seed % case.pages
    chosen = np.zeros(arrays.loaded().shape, dtype=bool)
    chosen[:, :, page] = True
    where = arrays.stored(chosen)
    changed = arrays.but(
        k_pages=np.where(where[..., None], arrays.k_pages[..., ::-1] + 1.0, arrays.k_pages),
        v_pages=np.where(where[..., None], 8.0 - arrays.v_pages, arrays.v_pages),
    )
    touched, _ = touching(arrays, where)
    before, after = attend(subject, arrays), attend(subject, changed)
    for name in ("out", "lse"):
        old, new = host(getattr(before, name)), host(getattr(after, name))
        expect_same_bits(new[~touched], old[~touched], f"{name} of rows that did not select page {page}", "ATTEND-3")


def touching(arrays: Arrays, where: Host) -> tuple[Host, Host]:
    """Return the rows, bool ``(batch, q_heads, tokens)``, that read a physical slot of ``where``; that feel it."""
    table = np.where(arrays.page_lengths > 0, arrays.page_table, 0)
    hit: Host = np.repeat(where[table].swapaxes(1, 2), arrays.group, axis=1)
    keys = context_keys(arrays)
    hit = keys.allowed & hit.reshape(*hit.shape[:2], 1, keys.allowed.shape[3])
    felt = hit & (weights(arrays, keys) >= COUNTS)
    return np.asarray(hit.any(axis=3)), np.asarray(felt.any(axis=3))


@pytest.mark.clause("MERGE-4", "ATTEND-1")
@law(case=cases(regimes=EXACT, min_pages=1), share=0.7)
def test_nan_in_a_key_shows_in_every_row_that_reads_it(subject: Subject, case: Case, arrays: Arrays) -> None:
    stored = np.argwhere(arrays.stored())
    where = np.zeros(arrays.stored().shape, dtype=bool)
    if len(stored):
        where[tuple(stored[case.seed % len(stored)])] = True
    touched, felt = touching(arrays, where)
    for name, rows in (("k_pages", touched), ("v_pages", felt)):
        rotten = arrays.but(**{name: np.where(where[..., None], np.nan, getattr(arrays, name))})
        state = attend(subject, rotten)
        what = f"NaN in {name} must show in the {{}} of every row that reads it, unless its weight is 0"
        expect(np.isnan(host(state.out)[rows]).all(), "MERGE-4", what.format("out"))
        if name == "k_pages":
            expect(np.isnan(host(state.lse)[rows]).all(), "MERGE-4", what.format("lse"))


@pytest.mark.clause("ATTEND-5")
@law(case=cases(regimes=("dyadic", "generic", "large", "mixed_scale"), min_pages=1), share=0.7)
def test_a_superset_of_pages_never_lowers_the_lse(subject: Subject, case: Case, arrays: Arrays) -> None:
    more = np.random.default_rng(case.seed).integers(0, 2, arrays.mask.shape).astype(bool)
    wider = arrays.but(mask=arrays.mask | more)
    few, many = host(attend(subject, arrays).lse), host(attend(subject, wider).lse)
    slack = accuracy.attention(wider, context_keys(wider)).lse_budget
    lowered = many < few - slack
    expect(not lowered.any(), "ATTEND-5", f"more pages must not lower the lse; {int(lowered.sum())} rows fell")


@pytest.mark.clause("GQA-1")
@law(case=cases(), share=0.5)
def test_permuting_the_kv_heads_permutes_the_groups(subject: Subject, case: Case) -> None:
    arrays = case.arrays(subject.dtype).but(mask=case.mask()[:, :1])
    order = np.random.default_rng(case.seed).permutation(case.kv_heads)
    heads = (order[:, None] * case.group + np.arange(case.group)).ravel()
    moved = arrays.but(q=arrays.q[:, heads], k_pages=arrays.k_pages[:, order], v_pages=arrays.v_pages[:, order])
    before, after = attend(subject, arrays), attend(subject, moved)
    expected = accuracy.attention(moved, context_keys(moved))
    expect_alike(after, before, expected, "after a permutation of the KV heads", "GQA-1", theirs=heads)


@pytest.mark.clause("GQA-2", "SELECTION-1")
@law(case=cases(heads=("query", "kv")), share=0.7)
def test_each_query_head_reads_its_own_selection(subject: Subject, case: Case, arrays: Arrays) -> None:
    share = case.q_heads // arrays.mask.shape[1]
    together = attend(subject, arrays)
    for head in range(min(case.q_heads, 7)):
        alone = arrays.but(mask=arrays.mask[:, head // share][:, None])
        expected = accuracy.attention(alone, context_keys(alone))
        what = f"of query head {head} alone"
        expect_alike(together, attend(subject, alone), expected, what, "GQA-2", mine=head, theirs=head)


@pytest.mark.clause("SELECTION-1")
@law(case=cases(spans=(1, 2, 3, 32)), share=0.5)
def test_a_span_is_as_good_as_its_rows(subject: Subject, case: Case, arrays: Arrays) -> None:
    rows = np.repeat(arrays.mask, case.span, axis=2)[:, :, : case.tokens]
    single = arrays.but(mask=rows, span=1)
    expected = accuracy.attention(arrays, context_keys(arrays))
    expect_alike(attend(subject, single), attend(subject, arrays), expected, "with span 1", "SELECTION-1")


@pytest.mark.clause("BLOCK-1", "STATE-1", "STATE-3", "GQA-1")
@law(case=cases(max_pages=1))
def test_attend_block_equals_one_softmax(subject: Subject, case: Case, arrays: Arrays, on: Loaded) -> None:
    state = subject.backend.attend_block(on.q, on.k, on.v, scale=case.scale)
    out, lse = expect_state(subject, state, "attend_block", arrays.q.shape)
    expect_state_close(out, lse, accuracy.attention(arrays, block_keys(arrays)), "attend_block", "BLOCK-1")


@pytest.mark.clause("BLOCK-1")
@law(case=cases(max_pages=1, layouts=("plain",)), share=0.5)
def test_a_block_may_have_more_or_fewer_keys_than_rows(subject: Subject, case: Case, arrays: Arrays) -> None:
    keys = 1 + case.seed % 9
    cut = arrays.but(
        k=np.resize(arrays.k, (case.batch, case.kv_heads, keys, case.head_dim)),
        v=np.resize(arrays.v, (case.batch, case.kv_heads, keys, case.head_dim)),
    )
    on = subject.load(cut)
    state = subject.backend.attend_block(on.q, on.k, on.v, scale=case.scale)
    out, lse = expect_state(subject, state, "attend_block", arrays.q.shape)
    expect_state_close(out, lse, accuracy.attention(cut, block_keys(cut)), "attend_block", "BLOCK-1")


@pytest.mark.clause("ATTEND-1", "BLOCK-1")
@law(case=cases(max_batch=1, min_pages=1, layouts=("plain",)), share=0.5)
def test_all_pages_equal_dense_attention_over_the_same_keys(subject: Subject, case: Case, arrays: Arrays) -> None:
    arrays = arrays.but(mask=np.ones_like(arrays.mask), active=np.ones_like(arrays.active))
    valid = np.arange(case.page_size) < arrays.page_lengths[0][:, None]
    table = np.where(arrays.page_lengths[0] > 0, arrays.page_table[0], 0)
    dense = arrays.but(
        **{
            name: getattr(arrays, f"{name}_pages")[table].swapaxes(1, 2)[valid].swapaxes(0, 1)[None]
            for name in ("k", "v")
        }
    )
    if dense.k.shape[2] == 0:
        return
    on = subject.load(dense)
    block = subject.backend.attend_block(on.q, on.k, on.v, scale=case.scale)
    expected = accuracy.attention(dense, block_keys(dense))
    expect_alike(attend(subject, arrays), block, expected, "over all pages", "ATTEND-1")


@pytest.mark.clause("ACCURACY-1")
@law(share=0.1, case=cases(max_batch=1, min_pages=1, max_pages=2, layouts=("plain",), groups=(1, 2, 4, 7)))
def test_sums_over_many_keys_do_not_stall(subject: Subject, case: Case, arrays: Arrays) -> None:
    """Adding 1 to 2048 in float16 (256 in bfloat16) gives 2048 again: narrow sums stop growing."""
    pages = 3000 // case.page_size + 1
    stored = np.ones((1, case.kv_heads, case.page_size, case.head_dim))
    value = float(round_to(np.asarray(1.371), subject.dtype))  # its multiples do not fit into a few bits
    many = arrays.but(
        q=np.zeros_like(arrays.q),
        k_pages=stored,
        v_pages=value * stored,
        layout="plain",
        page_table=np.zeros((1, pages), np.int32),
        page_segments=None,
        mask=np.ones((1, 1, 1, pages), bool),
        page_lengths=np.full((1, pages), case.page_size, np.int32),
        span=case.tokens,
        active=np.ones_like(arrays.active),
    )
    state = attend(subject, many)
    keys = pages * case.page_size
    # All terms have one sign, so the errors of a plain float32 sum may add up: the classical bound n u.
    summing = keys * accuracy.EPS["float32"]
    expect_close(host(state.lse), np.log(keys), summing, "lse of many keys", "ACCURACY-1")
    expect_close(
        host(state.out),
        np.asarray(value),
        2 * (accuracy.EPS[subject.dtype] + summing) * value,
        "mean of many equal values",
        "ACCURACY-1",
    )


@pytest.mark.clause("ACCURACY-1")
@law(case=cases(regimes=("generic", "large"), min_pages=1, poisons=("zero",)), share=0.5)
def test_scores_and_lse_keep_float32_accuracy(subject: Subject, arrays: Arrays) -> None:
    arrays = arrays.but(mask=np.ones_like(arrays.mask), active=np.ones_like(arrays.active))
    expected = accuracy.attention(arrays, context_keys(arrays))
    lse = host(attend(subject, arrays).lse)
    expect_close(lse, expected.state.lse, expected.lse_budget, "lse", "ACCURACY-1")
