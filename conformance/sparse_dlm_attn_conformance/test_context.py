"""Laws of the context: what does not exist, page tables, views, and how tokens are cut into pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import Context
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.capabilities import Problem
from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import Arrays, Case, Host
from sparse_dlm_attn_conformance.checks import expect, expect_close, expect_same_bits, expect_state_close
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.operations import OVER_CONTEXT, arrays_in, prepare
from sparse_dlm_attn_conformance.oracle import context_keys
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Subject, host

PLAIN = ("plain",)


def expect_unchanged(subject: Subject, before: Arrays, after: Arrays, what: str, clause: str) -> None:
    """Check that every operator over the context gives the same bits for two problems."""
    for operator in OVER_CONTEXT:
        old, new = (arrays_in(prepare(subject, arrays, operator).run()) for arrays in (before, after))
        for name, value in new.items():
            expect_same_bits(host(value), host(old[name]), f"{operator}{name} with {what}", clause)


@pytest.mark.clause("CONTEXT-2")
@law(case=cases(poisons=("zero",)))
def test_what_does_not_exist_changes_no_bit(subject: Subject, arrays: Arrays) -> None:
    for value in (np.nan, np.inf, 3e4):
        what = f"{value} in tokens that do not exist"
        expect_unchanged(subject, arrays, arrays.poisoned(~arrays.stored(), value), what, "CONTEXT-2")


@pytest.mark.clause("CONTEXT-2")
@law(case=cases(wild=False, poisons=("zero", "nan")), share=0.7)
def test_the_table_entry_of_an_absent_page_may_be_anything(subject: Subject, case: Case, arrays: Arrays) -> None:
    wild = (
        np.random.default_rng(case.seed)
        .choice([-1, 2**31 - 1, -(2**31), case.num_pages], arrays.page_table.shape)
        .astype(np.int32)
    )
    moved = arrays.but(page_table=np.where(arrays.page_lengths > 0, arrays.page_table, wild))
    expect_unchanged(subject, arrays, moved, "other table entries of absent pages", "CONTEXT-2")


@pytest.mark.clause("CONTEXT-3")
@law(case=cases())
def test_permuting_the_physical_pages_changes_no_bit(subject: Subject, case: Case, arrays: Arrays) -> None:
    order = np.random.default_rng(case.seed).permutation(case.num_pages)
    where = np.argsort(order).astype(np.int32)
    table = np.where(
        arrays.page_lengths > 0, where[np.where(arrays.page_lengths > 0, arrays.page_table, 0)], arrays.page_table
    )
    moved = arrays.but(k_pages=arrays.k_pages[order], v_pages=arrays.v_pages[order], page_table=table)
    expect_unchanged(subject, arrays, moved, "the physical pages permuted", "CONTEXT-3")


@pytest.mark.clause("CONTEXT-1")
@law(case=cases(layouts=("token_major", "gapped")))
def test_strides_are_free_but_for_the_last_axis(subject: Subject, case: Case, arrays: Arrays) -> None:
    expected, mass = accuracy.attention(arrays, context_keys(arrays)), accuracy.pooled_budget(arrays)
    budgets: dict[str, Host | float] = {".out": 2 * expected.out_budget, ".lse": 2 * expected.lse_budget, "": 2 * mass}
    for operator in OVER_CONTEXT[:3]:
        strided, plain = (
            arrays_in(prepare(subject, problem, operator).run()) for problem in (arrays, arrays.but(layout="plain"))
        )
        for name, value in strided.items():
            what = f"{operator}{name} with {case.layout} strides"
            expect_close(host(value), host(plain[name]), budgets.get(name, 0.0), what, "CONTEXT-1")


@pytest.mark.clause("CONTEXT-1")
@law(case=cases(layouts=PLAIN, min_pages=2), share=0.5)
def test_reading_order_is_logical_order(subject: Subject, case: Case, arrays: Arrays) -> None:
    """Swapping two logical pages swaps their bounds and masses, whatever lies where in memory."""
    swapped = np.arange(case.pages)[::-1]
    moved = arrays.but(
        page_table=arrays.page_table[:, swapped], page_lengths=arrays.page_lengths[:, swapped], page_segments=None
    )
    ops, before, after = subject.backend, subject.load(arrays), subject.load(moved)
    old, new = ops.page_bounds(before.context), ops.page_bounds(after.context)
    expect_same_bits(host(new.lower), host(old.lower)[:, :, swapped], "lower bounds, pages reversed", "CONTEXT-1")
    expect_same_bits(host(new.upper), host(old.upper)[:, :, swapped], "upper bounds, pages reversed", "CONTEXT-1")
    masses = [host(ops.pooled_scores(on.q, on.context, span=case.span, scale=case.scale)) for on in (before, after)]
    budget = 2 * accuracy.pooled_budget(arrays)
    expect_close(masses[1], masses[0][..., swapped], budget, "pooled_scores, pages reversed", "CONTEXT-1")


@pytest.mark.clause("CONTEXT-5", "MERGE-1")
@law(case=cases(max_batch=2, layouts=PLAIN, heads=("one",), min_pages=1), share=0.7)
def test_how_tokens_are_cut_into_pages_does_not_matter(subject: Subject, case: Case, arrays: Arrays) -> None:
    arrays = arrays.but(mask=np.ones_like(arrays.mask))
    expected = accuracy.attention(arrays, context_keys(arrays))
    for size in (1, 2, 3, 8, 16):
        problem = Problem(
            subject.dtype, case.head_dim, size, case.q_heads, case.kv_heads, case.tokens, subject.device_kind
        )
        if subject.backend.why_not(problem):
            continue
        cut = recut(arrays, size)
        on = subject.load(cut)
        state = subject.backend.attend_pages(on.q, on.context, on.selection, on.active, scale=case.scale)
        expect_state_close(host(state.out), host(state.lse), expected, f"pages of {size} tokens", "CONTEXT-5")


def recut(arrays: Arrays, size: int) -> Arrays:
    """Return the same tokens in pages of another size, all selected."""
    slots = np.arange(arrays.page_size) < arrays.page_lengths[:, :, None]
    table = np.where(arrays.page_lengths > 0, arrays.page_table, 0)
    batch, longest = len(table), int(arrays.page_lengths.sum(axis=1).max())
    pages = max(1, -(-longest // size))
    shape = (batch * pages, arrays.k_pages.shape[1], size, arrays.k_pages.shape[3])
    parts: dict[str, Host] = {"k_pages": np.full(shape, np.nan), "v_pages": np.full(shape, np.nan)}
    for name, stored in parts.items():
        for b in range(batch):
            tokens = getattr(arrays, name)[table[b]].swapaxes(1, 2)[slots[b]]
            for page in range(pages):
                piece = tokens[page * size : (page + 1) * size]
                stored[b * pages + page, :, : len(piece)] = piece.swapaxes(0, 1)
    lengths = arrays.page_lengths.sum(axis=1)[:, None] - np.arange(pages) * size
    return arrays.but(
        **parts,
        page_table=np.arange(batch * pages, dtype=np.int32).reshape(batch, pages),
        page_lengths=np.clip(lengths, 0, size).astype(np.int32),
        page_segments=None,
        mask=np.ones((batch, 1, arrays.mask.shape[2], pages), dtype=bool),
    )


@pytest.mark.clause("CONTEXT-4", "CONTEXT-1")
@law(case=cases(layouts=PLAIN, poisons=("zero",), min_pages=1), share=0.5)
def test_from_dense_views_the_cache(subject: Subject, case: Case, arrays: Arrays) -> None:
    rng = np.random.default_rng(case.seed)
    tokens = case.pages * case.page_size
    k, v = (rng.integers(-8, 9, (case.batch, case.kv_heads, tokens, case.head_dim)) / 8.0 for _ in range(2))
    lengths = rng.integers(0, tokens + 1, case.batch).astype(np.int32)
    cache = subject.floats(k), subject.floats(v)
    context = Context.from_dense(*cache, case.page_size, lengths=subject.ints(lengths))
    for name, dense, pages in (("k", cache[0], context.k_pages), ("v", cache[1], context.v_pages)):
        expect(shares_memory(dense, pages), "CONTEXT-4", f"Context.from_dense must view {name}, not copy it")
    paged = (case.batch, case.kv_heads, case.pages, case.page_size, case.head_dim)
    stored = (part.reshape(paged).swapaxes(1, 2).reshape(-1, *paged[1:2], *paged[3:]) for part in (k, v))
    held = np.clip(lengths[:, None] - np.arange(case.pages) * case.page_size, 0, case.page_size).astype(np.int32)
    table = np.arange(case.batch * case.pages, dtype=np.int32).reshape(case.batch, case.pages)
    pages = dict(zip(("k_pages", "v_pages"), stored, strict=True))
    problem = arrays.but(**pages, page_table=table, page_lengths=held, page_segments=None)
    on = subject.load(problem)
    state = subject.backend.attend_pages(on.q, context, on.selection, on.active, scale=case.scale)
    expected = accuracy.attention(problem, context_keys(problem))
    expect_state_close(host(state.out), host(state.lse), expected, "a dense cache", "CONTEXT-4")


def shares_memory(one: Any, other: Any) -> bool:
    """Return whether two arrays of one library overlap in memory; one without elements has none."""
    if 0 in one.shape or 0 in other.shape:
        return False
    for pointer in ("untyped_storage",):  # PyTorch, on any device
        if hasattr(one, pointer):
            return bool(getattr(one, pointer)().data_ptr() == getattr(other, pointer)().data_ptr())
    return bool(np.shares_memory(to_numpy(one), to_numpy(other)))


@pytest.mark.clause("SELECTION-2")
@law(case=cases(max_batch=2), share=0.5, one_dtype=True)
def test_page_lists_say_the_same_as_the_mask(subject: Subject, arrays: Arrays) -> None:
    indices, counts = (host(part) for part in subject.load(arrays).selection.page_lists())
    expect(indices.dtype == np.int32 and counts.dtype == np.int32, "SELECTION-2", "page lists must be int32")
    for position in np.ndindex(*arrays.mask.shape[:3]):
        listed = np.flatnonzero(arrays.mask[position])
        expect(int(counts[position]) == len(listed), "SELECTION-2", f"wrong count at {position}")
        row = indices[position]
        text = f"list {position} must be {listed.tolist()}, then -1; got {row.tolist()}"
        expect(row[: len(listed)].tolist() == listed.tolist() and (row[len(listed) :] == -1).all(), "SELECTION-2", text)


@pytest.mark.clause("SELECTION-2")
@law(case=cases(max_batch=2), share=0.3, one_dtype=True)
def test_csr_lists_hold_physical_pages(subject: Subject, case: Case, arrays: Arrays) -> None:
    full = arrays.but(page_lengths=np.where(arrays.page_lengths > 0, case.page_size, 0).astype(np.int32))
    on = subject.load(full)
    indptr, indices, last = on.selection.to_csr(on.context)
    for number, position in enumerate(np.ndindex(*full.mask.shape[:3])):
        exists = full.page_lengths[position[0]] > 0
        wanted = full.page_table[position[0]][np.flatnonzero(full.mask[position] & exists)]
        got = indices[indptr[number] : indptr[number + 1]]
        expect_same_bits(got, wanted.astype(got.dtype), f"CSR list {position}", "SELECTION-2")
        expect(last[number] == (case.page_size if len(wanted) else 0), "SELECTION-2", "wrong last_page_len")
