"""Laws of sizes beyond a tile: long blocks and contexts, large pages, many heads, pages far out, none at all.

Kernels cut their work into tiles of 16 to 128 rows or keys, and number things in few bits. What goes wrong
at the seams shows only where there is more than one tile.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import Arrays, Case
from sparse_dlm_attn_conformance.checks import expect, expect_array, expect_close, expect_state_close
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.operations import OVER_CONTEXT, arrays_in, prepare
from sparse_dlm_attn_conformance.oracle import block_keys, context_keys, page_mass
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Loaded, Subject, host
from sparse_dlm_attn_conformance.test_attention import attend, close_to_oracle
from sparse_dlm_attn_reference import ReferenceBackend

LONG_BLOCKS = (130, 33, 65, 40, 64)
LONG = cases(
    max_batch=2,
    blocks=LONG_BLOCKS,
    head_dims=(2, 8, 16, 3),
    spans=(130, 1, 32),
    max_elements=32768,
    min_pages=2,
    max_pages=4,
)
FAR = 70_000
"""Physical pages of a large pool: their numbers do not fit into 16 bits."""


@pytest.mark.clause("ATTEND-1", "ACCURACY-2")
@law(case=cases(max_batch=2, min_pages=20, max_pages=48, layouts=("plain",)), share=0.3)
def test_long_contexts_equal_one_masked_softmax(subject: Subject, arrays: Arrays) -> None:
    """Hundreds of keys: kernels go through them in tiles, and must carry peak and sum from tile to tile."""
    close_to_oracle(subject, arrays, attend(subject, arrays), "ATTEND-1", "attend_pages")


@pytest.mark.clause("ATTEND-1", "POOLED-1", "SCORES-1", "BOUNDS-1")
@law(case=cases(min_pages=65, max_pages=300, page_sizes=(1, 2, 3), head_dims=(2, 4, 8, 3), max_batch=2), share=0.25)
def test_more_pages_than_a_word_has_bits(subject: Subject, arrays: Arrays) -> None:
    """Lists and bitmasks of pages have a capacity: nothing may be dropped beyond it."""
    close_to_oracle(subject, arrays, attend(subject, arrays), "ATTEND-1", "attend_pages over many pages")
    others_over_context(subject, arrays)


@pytest.mark.clause("ATTEND-1", "CONTEXT-2", "BOUNDS-1", "SCORES-1", "POOLED-1")
@law(
    case=cases(
        page_sizes=(128, 100, 64),
        head_dims=(256, 8, 96, 3),
        max_batch=2,
        min_pages=1,
        max_pages=3,
        regimes=("generic", "dyadic", "mixed_scale"),
    ),
    share=0.3,
)
def test_large_pages_and_wide_heads(subject: Subject, arrays: Arrays) -> None:
    """A page longer than a tile, a length that does not fit into eight bits, channels beyond the usual."""
    close_to_oracle(subject, arrays, attend(subject, arrays), "ATTEND-1", "attend_pages over large pages")
    others_over_context(subject, arrays)


@pytest.mark.clause("ATTEND-1", "SELECTION-1", "POOLED-1", "SCORES-1", "CHANGE-1")
@law(case=LONG, share=0.3)
def test_long_blocks_equal_one_masked_softmax(subject: Subject, case: Case, arrays: Arrays) -> None:
    close_to_oracle(subject, arrays, attend(subject, arrays), "ATTEND-1", "attend_pages of a long block")
    others_over_context(subject, arrays)
    on = subject.load(arrays)
    change = host(subject.backend.query_change(on.q, on.q_other))
    expected = ((arrays.q - arrays.q_other) ** 2).mean(axis=(1, 3))
    size = (np.maximum(np.abs(arrays.q), np.abs(arrays.q_other)) ** 2).mean(axis=(1, 3))
    budget = accuracy.change_budget(subject.dtype, size, case.q_heads * case.head_dim)
    expect_close(change, expected, budget, "query_change of a long block", "CHANGE-1")


@pytest.mark.clause("BLOCK-1", "ATTEND-4")
@law(case=LONG, share=0.3)
def test_long_blocks_attend_to_themselves(subject: Subject, case: Case, arrays: Arrays, on: Loaded) -> None:
    state = subject.backend.attend_block(on.q, on.k, on.v, scale=case.scale)
    close = accuracy.attention(arrays, block_keys(arrays))
    expect_state_close(host(state.out), host(state.lse), close, "attend_block of a long block", "BLOCK-1")
    out, _ = subject.backend.attend(on.q, on.k, on.v, on.context, on.selection, on.active, None, scale=case.scale)
    keys = context_keys(arrays).joined(block_keys(arrays))
    expected = accuracy.attention(arrays, keys, rounded_parts=2)
    expect_close(host(out), expected.state.out, expected.out_budget, "out of attend, long block", "ATTEND-4")


@pytest.mark.clause("GQA-1", "GQA-2", "ATTEND-1", "SCORES-1", "BOUNDS-1")
@law(
    case=cases(max_batch=5, kv_heads=(1, 4, 5, 8), groups=(16, 1, 8, 2, 4), head_dims=(4, 2, 16, 3), max_pages=3),
    share=0.3,
)
def test_many_heads_and_sequences(subject: Subject, arrays: Arrays) -> None:
    close_to_oracle(subject, arrays, attend(subject, arrays), "ATTEND-1", "attend_pages with many heads")
    others_over_context(subject, arrays)


def others_over_context(subject: Subject, arrays: Arrays) -> None:
    """Compare page bounds, page scores and pooled scores with their definitions."""
    on, bounds = subject.load(arrays), arrays.bounds()
    shape = bounds.lower.shape
    for name in ("lower", "upper"):
        got = getattr(subject.backend.page_bounds(on.context), name)
        got = expect_array(subject, got, f"page_bounds.{name}", shape, subject.dtype, "BOUNDS-1")
        expect_close(got, getattr(bounds, name), 0.0, f"page_bounds.{name}", "BOUNDS-1")
    reference = ReferenceBackend()
    scores = host(subject.backend.page_scores(on.q, subject.bounds(bounds)))
    budget = accuracy.scores_budget(subject.dtype, arrays.q, bounds.lower, bounds.upper)
    expect_close(scores, reference.page_scores(arrays.q, bounds), budget, "page_scores", "SCORES-1")
    mass = host(subject.backend.pooled_scores(on.q, on.context, span=arrays.span, scale=arrays.scale))
    expect_close(mass, page_mass(arrays, arrays.span), accuracy.pooled_budget(arrays), "pooled_scores", "POOLED-1")


@pytest.mark.clause("CONTEXT-1", "CONTEXT-3")
@law(case=cases(layouts=("plain",), wild=False, min_pages=1, max_batch=2), share=0.1)
def test_pages_far_out_in_a_large_pool_are_found(subject: Subject, case: Case) -> None:
    """The numbers of physical pages need more than 16 bits."""
    kept = replace(case, kv_heads=1, head_dim=min(case.head_dim, 4), page_size=min(case.page_size, 2))
    lengths = np.minimum(np.asarray(case.lengths), kept.page_size)
    kept = replace(kept, lengths=tuple(map(tuple, lengths.tolist())), heads="one")
    if subject.backend.why_not(kept.problem(subject.dtype, subject.device_kind)):
        kept = case  # only the drawn sizes are declared
    arrays = kept.arrays(subject.dtype)
    expect_pages_found(subject, arrays, FAR // max(1, arrays.k_pages[0].size // 8))


def expect_pages_found(subject: Subject, arrays: Arrays, empty: int) -> None:
    """Move all pages behind ``empty`` others, half of them to the front, and look for them."""
    table = np.where(arrays.page_lengths > 0, arrays.page_table, 0)
    nothing = np.zeros((empty, *arrays.k_pages.shape[1:]))
    far = arrays.but(
        k_pages=np.concatenate([nothing, arrays.k_pages]),
        v_pages=np.concatenate([nothing, arrays.v_pages]),
        page_table=(table + empty).astype(np.int32),
    )
    close_to_oracle(subject, far, attend(subject, far), "CONTEXT-1", "attend_pages over far pages")
    lower = host(subject.backend.page_bounds(subject.load(far).context).lower)
    expect_close(lower, arrays.bounds().lower, 0.0, "page_bounds of far pages", "CONTEXT-1")


@pytest.mark.clause("STATE-2", "POOLED-2", "BOUNDS-1", "ATTEND-4")
@law(case=cases(), share=0.3)
def test_a_context_of_no_pages(subject: Subject, case: Case, arrays: Arrays) -> None:
    segments = arrays.page_segments
    none = arrays.but(
        page_table=arrays.page_table[:, :0],
        page_lengths=arrays.page_lengths[:, :0],
        page_segments=None if segments is None else segments[:, :0],
        mask=arrays.mask[..., :0],
    )
    state = attend(subject, none)
    expect((host(state.out) == 0).all(), "STATE-2", "without pages out must be 0")
    expect(np.isneginf(host(state.lse)).all(), "STATE-2", "without pages lse must be -inf")
    for operator in OVER_CONTEXT[:2]:
        for name, value in arrays_in(prepare(subject, none, operator).run()).items():
            expect(host(value).size == 0, "BOUNDS-1", f"{operator}{name} of no pages must hold no page")
    on = subject.load(none)
    out, kept = subject.backend.attend(on.q, on.k, on.v, on.context, on.selection, on.active, None, scale=case.scale)
    expected = accuracy.attention(none, block_keys(none), rounded_parts=1)
    expect_close(host(out), expected.state.out, expected.out_budget, "attend without pages", "ATTEND-4")
    expect(np.isneginf(host(kept.lse)).all(), "STATE-2", "without pages the context state must be empty")


@pytest.mark.clause("ATTEND-1", "BLOCK-1", "POOLED-1", "ACCURACY-1")
@law(case=cases(regimes=("generic", "dyadic", "ties"), poisons=("zero",), max_batch=2), share=0.5)
def test_scores_far_from_zero_are_as_good_as_any(subject: Subject, case: Case, arrays: Arrays) -> None:
    """A softmax does not change when all its scores move, however far: up, where exp overflows, or down."""
    size, sign = (16.0, 250.0)[case.seed % 2], (-1.0, 1.0)[case.seed // 2 % 2]
    first = np.arange(case.head_dim) == 0
    far = arrays.but(
        q=np.where(first, size, arrays.q),
        k=np.where(first, sign * size, arrays.k),
        k_pages=np.where(first, sign * size, arrays.k_pages),
    )
    what = f"with {sign * size * size:g} added to each product q.k"
    close_to_oracle(subject, far, attend(subject, far), "ATTEND-1", f"attend_pages {what}")
    on = subject.load(far)
    block = subject.backend.attend_block(on.q, on.k, on.v, scale=case.scale)
    close_to_block = accuracy.attention(far, block_keys(far))
    expect_state_close(host(block.out), host(block.lse), close_to_block, f"attend_block {what}", "BLOCK-1")
    mass = host(subject.backend.pooled_scores(on.q, on.context, span=far.span, scale=far.scale))
    budget = accuracy.pooled_budget(far)
    expect_close(mass, page_mass(far, far.span), budget, f"pooled_scores {what}", "POOLED-1")


@pytest.mark.clause("CONTEXT-1")
@law(
    case=cases(
        layouts=("plain",),
        wild=False,
        min_pages=2,
        max_batch=1,
        poisons=("zero",),
        head_dims=(128, 64),
        page_sizes=(64, 16),
        regimes=("dyadic",),
    ),
    share=0.02,
)
def test_a_pool_of_more_than_2_to_31_numbers(subject: Subject, case: Case, arrays: Arrays, on: Loaded) -> None:
    """Offsets into a large cache need more than 32 bits. Needs 9 to 17 GB, so it runs only when asked for."""
    if os.environ.get("SDA_CONFORMANCE_HUGE", "0") == "0":
        pytest.skip("a pool of 2^31 numbers needs gigabytes; set SDA_CONFORMANCE_HUGE=1 to run this law")
    a_page = arrays.k_pages[0].size
    moved = 2**31 // a_page + 1
    pools = []
    for pages in (on.context.k_pages, on.context.v_pages):
        pool = np.zeros if isinstance(pages, np.ndarray) else pages.new_zeros
        wide = pool((moved + len(arrays.k_pages), *arrays.k_pages.shape[1:]), dtype=pages.dtype)
        wide[moved:] = pages
        pools.append(wide)
    table = np.where(arrays.page_lengths > 0, arrays.page_table + moved, 0).astype(np.int32)
    context = replace(on.context, k_pages=pools[0], v_pages=pools[1], page_table=subject.ints(table))
    state = subject.backend.attend_pages(on.q, context, on.selection, on.active, scale=case.scale)
    close_to_oracle(subject, arrays, state, "CONTEXT-1", "attend_pages over a huge pool")
    lower = host(subject.backend.page_bounds(context).lower)
    expect_close(lower, arrays.bounds().lower, 0.0, "page_bounds over a huge pool", "CONTEXT-1")
