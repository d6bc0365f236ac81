"""Scores and masses of one tile of a sweep over a context, for `pooled`."""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_dlm_attn_triton.tiles import NEG_INF, load_rows, product

__all__ = ["add_to_scores", "full_scores", "pages_of_program", "partial_scores", "physical_pages", "row_masses"]


@triton.jit
def physical_pages(table_at, page, table_page, pages, BLOCK_N: tl.constexpr, ROOM: tl.constexpr, SLOTS: tl.constexpr):
    """Return where the pages from ``page`` on lie: a number, or one a key where a step has several."""
    if SLOTS == 1:
        physical = tl.load(table_at + tl.minimum(page, pages - 1) * table_page)
    else:
        at = tl.minimum(page + tl.arange(0, BLOCK_N) // ROOM, pages - 1)
        physical = tl.load(table_at + at * table_page)
    return physical


@triton.jit
def full_scores(
    queries,
    k_at,
    physical,
    sub,
    k_stride,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Return raw scores ``[BLOCK_M, BLOCK_N]`` of keys of full pages; -inf behind a page's tokens."""
    key = tl.arange(0, BLOCK_N)
    within = key % ROOM + sub * BLOCK_N
    rows = physical.to(tl.int64) * k_stride[0] + within * k_stride[2]
    scores = product(queries, load_rows(k_at, rows, 1, within < PAGE_SIZE, HEAD_DIM, BLOCK_D, ROOM != PAGE_SIZE))
    if ROOM != PAGE_SIZE:
        scores = tl.where((within < PAGE_SIZE)[None, :], scores, NEG_INF)
    return scores


@triton.jit
def partial_scores(
    queries,
    k_at,
    table_at,
    lengths_at,
    page,
    sub,
    table_page,
    lengths_page,
    k_stride,
    end,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Return the same for pages of any length; -inf where no token is."""
    key = tl.arange(0, BLOCK_N)
    at = page + key // ROOM
    within = key % ROOM + sub * BLOCK_N
    length = tl.load(lengths_at + at * lengths_page, mask=at < end, other=0)
    inside = within < length
    physical = tl.load(table_at + at * table_page, mask=inside, other=0).to(tl.int64)
    rows = physical * k_stride[0] + within * k_stride[2]
    scores = product(queries, load_rows(k_at, rows, 1, inside, HEAD_DIM, BLOCK_D, True))
    return tl.where(inside[None, :], scores, NEG_INF)


@triton.jit
def pages_of_program(runs, b, pages_a_program):
    """Return the pages of a program: full ones from `begin` to `full`, partial and absent ones up to `end`."""
    begin, full, end = tl.load(runs + b * 3), tl.load(runs + b * 3 + 1), tl.load(runs + b * 3 + 2)
    begin += tl.program_id(2) * pages_a_program
    end = tl.minimum(end, begin + pages_a_program)
    full = tl.maximum(tl.minimum(full, end), begin)
    return begin, full, end


@triton.jit
def row_masses(scores, lse_log2, alive, scale_log2, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr):
    """Return each row's softmax mass on each page of a step, ``[BLOCK_M, SLOTS]``."""
    weights = tl.exp2(scores * scale_log2 - lse_log2[:, None])
    mass = tl.sum(tl.reshape(weights, [BLOCK_M, SLOTS, weights.shape[1] // SLOTS]), 2)
    return tl.where(alive[:, None], mass, 0.0)


@triton.jit
def add_to_scores(
    scores,
    mass,
    sizes,
    page,
    end,
    spans,
    pages,
    index,
    SPANS: tl.constexpr,
    SPAN_ROOM: tl.constexpr,
    SLOTS: tl.constexpr,
    MANY: tl.constexpr,
):
    """Average the rows of SPANS spans over SLOTS pages; MANY: a span's rows come in several parts."""
    mass = tl.where(mass > 1.0, 1.0, mass)  # whatever the LSE; lets NaN through
    mean = tl.sum(tl.reshape(mass, [SPANS, SPAN_ROOM, SLOTS]), 1) / sizes[:, None]
    column = page + tl.arange(0, SLOTS)
    at = scores + index[:, None].to(tl.int64) * pages + column[None, :]
    keep = (index[:, None] < spans) & (column[None, :] < end)
    if MANY:  # one program adds all parts, one after the other: the order is fixed
        tl.atomic_add(at, mean, mask=keep)
    else:
        tl.store(at, mean, mask=keep)
