"""The selection sweep: how much of each span's attention falls on each page (clauses POOLED-1 to 3).

Given the LSE of the dense pass that a policy selects after, one sweep over the keys sums
``exp(scale q.k - lse)`` within tiles of rows and pages; nothing of the size rows x keys is ever stored.
Without it a first sweep finds the LSE. See docs/backends/full-sequence.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sparse_dlm_attn_triton.full_sequence import _load_rows, _product
from sparse_dlm_attn_triton.span_tiles import LOG2_E, Tile, padded_dim, pooled_tile

__all__ = ["context_lse", "pooled_scores"]

PROGRAMS = 1024  # enough to fill a large GPU several times over
LEAST_STEPS = 8  # steps that repay a program of its own


@triton.jit
def _places(table_at, page, table_page, pages, KEYS: tl.constexpr, ROOM: tl.constexpr, SLOTS: tl.constexpr):
    """Return where the pages from ``page`` on lie: a number, or one a key where a step has several."""
    if SLOTS == 1:
        physical = tl.load(table_at + tl.minimum(page, pages - 1) * table_page)
    else:
        at = tl.minimum(page + tl.arange(0, KEYS) // ROOM, pages - 1)
        physical = tl.load(table_at + at * table_page)
    return physical


@triton.jit
def _whole_scores(
    queries, k_at, physical, sub, k_page, k_token, factor, PAGE: tl.constexpr, DIM: tl.constexpr,
    CHANNELS: tl.constexpr, KEYS: tl.constexpr, ROOM: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Return base-2 scores of keys of whole pages, ``(rows, KEYS)``; -inf behind a page's tokens."""
    key = tl.arange(0, KEYS)
    within = key % ROOM + sub * KEYS
    rows = physical.to(tl.int64) * k_page + within * k_token
    keys = _load_rows(k_at, rows, 1, within < PAGE, DIM, CHANNELS, ROOM != PAGE)
    scores = _product(queries, keys) * factor
    if ROOM != PAGE:
        scores = tl.where((within < PAGE)[None, :], scores, -float("inf"))
    return scores


@triton.jit
def _partial_scores(
    queries, k_at, table_at, lengths_at, page, sub, table_page, lengths_page, k_page, k_token, end, factor,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Return the same for pages of any length; -inf where no token is."""
    key = tl.arange(0, KEYS)
    at = page + key // ROOM
    within = key % ROOM + sub * KEYS
    length = tl.load(lengths_at + at * lengths_page, mask=at < end, other=0)
    inside = within < length
    physical = tl.load(table_at + at * table_page, mask=inside, other=0).to(tl.int64)
    keys = _load_rows(k_at, physical * k_page + within * k_token, 1, inside, DIM, CHANNELS, True)
    scores = _product(queries, keys) * factor
    return tl.where(inside[None, :], scores, -float("inf"))


@triton.jit
def _share(runs, b, pages_a_program):
    """Return the pages of a program: whole ones up to `whole`, partial and absent ones up to `end`."""
    begin, whole, end = tl.load(runs + b * 3), tl.load(runs + b * 3 + 1), tl.load(runs + b * 3 + 2)
    begin += tl.program_id(2) * pages_a_program
    end = tl.minimum(end, begin + pages_a_program)
    whole = tl.maximum(tl.minimum(whole, end), begin)
    return begin, whole, end


@triton.jit
def _add_to_scores(
    scores, mass, sizes, page, end, spans, pages, index, SPANS: tl.constexpr, SPAN_ROOM: tl.constexpr,
    SLOTS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def _pool(
    q, k, lse, scores, table, lengths, runs, q_b, q_h, q_t, k_page, k_head, k_token, table_row, table_page,
    lengths_row, lengths_page, tokens, span, spans, pages, pages_a_program, parts, q_heads, kv_heads, factor,
    PAGE: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ROOM: tl.constexpr, SLOTS: tl.constexpr, SUBS: tl.constexpr, SPANS: tl.constexpr,
    SPAN_ROOM: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Score a share of the pages for the spans of one tile of one head; see `pooled_scores`."""
    b, head = tl.program_id(1) // q_heads, tl.program_id(1) % q_heads
    k_at = k + (head // (q_heads // kv_heads)).to(tl.int64) * k_head
    q_at = q + b.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    table_at, lengths_at = table + b * table_row, lengths + b * lengths_row
    lse_at = lse + tl.program_id(1).to(tl.int64) * tokens
    scores_at = scores + tl.program_id(1).to(tl.int64) * spans * pages
    begin, whole, end = _share(runs, b, pages_a_program)
    bulk = (whole - begin) // SLOTS
    index = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    sizes = tl.maximum(tl.minimum(tokens - index * span, span), 1).to(tl.float32)
    local = tl.arange(0, ROWS)
    for part in range(parts):
        place = local % SPAN_ROOM + part * ROWS
        row = (tl.program_id(0) * SPANS + local // SPAN_ROOM) * span + place
        alive = (place < span) & (row < tokens)
        queries = _load_rows(q_at, row.to(tl.int64), q_t, alive, DIM, CHANNELS, True)
        log = tl.load(lse_at + row, mask=alive, other=0.0)
        # A row without mass has scores of -inf alone: any finite stand-in gives 0 for it.
        shift = tl.where(log == -float("inf"), 0.0, log) * 1.4426950408889634
        # Read one step ahead, so that keys do not wait for the table within a step.
        physical = _places(table_at, begin, table_page, pages, KEYS, ROOM, SLOTS)
        for i in range(bulk):
            page = begin + i * SLOTS
            mass = tl.zeros([ROWS, SLOTS], dtype=tl.float32)
            for sub in range(SUBS):
                found = _whole_scores(
                    queries, k_at, physical, sub, k_page, k_token, factor, PAGE, DIM, CHANNELS, KEYS, ROOM,
                    SLOTS,
                )
                mass += _row_masses(found, shift, alive, ROWS, SLOTS)
            _add_to_scores(
                scores_at, mass, sizes, page, end, spans, pages, index, SPANS, SPAN_ROOM, SLOTS, MANY
            )
            physical = _places(table_at, page + SLOTS, table_page, pages, KEYS, ROOM, SLOTS)
        for page in range(begin + bulk * SLOTS, end, SLOTS):
            mass = tl.zeros([ROWS, SLOTS], dtype=tl.float32)
            for sub in range(SUBS):
                found = _partial_scores(
                    queries, k_at, table_at, lengths_at, page, sub, table_page, lengths_page, k_page,
                    k_token, end, factor, DIM, CHANNELS, KEYS, ROOM,
                )
                mass += _row_masses(found, shift, alive, ROWS, SLOTS)
            _add_to_scores(
                scores_at, mass, sizes, page, end, spans, pages, index, SPANS, SPAN_ROOM, SLOTS, MANY
            )


@triton.jit
def _row_masses(found, shift, alive, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Return each row's softmax mass on each page of a step, ``(ROWS, SLOTS)``."""
    weights = tl.exp2(found - shift[:, None])
    mass = tl.sum(tl.reshape(weights, [ROWS, SLOTS, weights.shape[1] // SLOTS]), 2)
    return tl.where(alive[:, None], mass, 0.0)


@triton.jit
def _sweep_lse(
    q, k, logs, table, lengths, runs, q_b, q_h, q_t, k_page, k_head, k_token, table_row, table_page,
    lengths_row, lengths_page, tokens, pages, pages_a_program, shares, q_heads, kv_heads, factor,
    PAGE: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ROOM: tl.constexpr, SLOTS: tl.constexpr, SUBS: tl.constexpr,
):  # fmt: skip
    """Find the LSE of one tile of rows over a share of the pages; see `context_lse`."""
    b, head = tl.program_id(1) // q_heads, tl.program_id(1) % q_heads
    k_at = k + (head // (q_heads // kv_heads)).to(tl.int64) * k_head
    q_at = q + b.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    table_at, lengths_at = table + b * table_row, lengths + b * lengths_row
    begin, whole, end = _share(runs, b, pages_a_program)
    bulk = (whole - begin) // SLOTS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < tokens
    queries = _load_rows(q_at, row.to(tl.int64), q_t, alive, DIM, CHANNELS, True)
    peak = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    physical = _places(table_at, begin, table_page, pages, KEYS, ROOM, SLOTS)
    for i in range(bulk):
        for sub in range(SUBS):
            found = _whole_scores(
                queries, k_at, physical, sub, k_page, k_token, factor, PAGE, DIM, CHANNELS, KEYS, ROOM, SLOTS,
            )
            peak, total = _take_in(found, peak, total)
        physical = _places(table_at, begin + (i + 1) * SLOTS, table_page, pages, KEYS, ROOM, SLOTS)
    for page in range(begin + bulk * SLOTS, end, SLOTS):
        for sub in range(SUBS):
            found = _partial_scores(
                queries, k_at, table_at, lengths_at, page, sub, table_page, lengths_page, k_page, k_token,
                end, factor, DIM, CHANNELS, KEYS, ROOM,
            )
            peak, total = _take_in(found, peak, total)
    log = (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    log = tl.where(total == 0.0, -float("inf"), log)
    at = (tl.program_id(1) * shares + tl.program_id(2)).to(tl.int64) * tokens
    tl.store(logs + at + row, log, mask=alive)


@triton.jit
def _take_in(found, peak, total):
    """Take a step's scores into a streaming sum of exponentials."""
    higher = tl.maximum(peak, tl.max(found, 1))
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(found - shift[:, None]), 1)
    return higher, total


def _runs(lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return, int32 ``(batch, 3)``, where pages begin, where the first run of whole pages ends, and the end.

    Computed on the device: what a kernel skips without a look by the host.
    """
    pages = lengths.shape[1]
    number = torch.arange(pages, device=lengths.device, dtype=torch.int32)
    exists = lengths > 0
    begin = torch.where(exists, number, pages).amin(1)
    end = torch.where(exists, number + 1, 0).amax(1)
    broken = (lengths != page_size) & (number >= begin[:, None])
    whole = torch.minimum(torch.where(broken, number, pages).amin(1), end)
    return torch.stack([torch.minimum(begin, end), whole, end], dim=1).to(torch.int32).contiguous()


def _steps(page_size: int, tile: Tile) -> dict[str, int]:
    """Return how a step's keys are dealt out to pages; a page takes a power of two of them."""
    room = triton.next_power_of_2(page_size)
    keys = tile.tokens
    if room >= keys:
        return {"KEYS": keys, "ROOM": room, "SLOTS": 1, "SUBS": room // keys}
    return {"KEYS": keys, "ROOM": room, "SLOTS": keys // room, "SUBS": 1}


def _shares(programs: int, pages: int, slots: int) -> tuple[int, int]:
    """Return over how many programs the pages are dealt out, and the pages of each."""
    wanted = triton.cdiv(PROGRAMS, max(programs, 1))
    each = max(triton.cdiv(pages, wanted), LEAST_STEPS * slots)
    each = triton.cdiv(each, slots) * slots
    return triton.cdiv(pages, each), each


def context_lse(
    q: torch.Tensor, k_pages: torch.Tensor, page_table: torch.Tensor, page_lengths: torch.Tensor,
    scale: float, *, tile: Tile | None = None,
) -> torch.Tensor:
    """Return the LSE of every row over all valid keys, without values.

    Parameters
    ----------
    q, k_pages, page_table, page_lengths, scale, tile
        As for `pooled_scores`.

    Returns
    -------
    torch.Tensor
        float32 ``(batch, q_heads, tokens)``, natural log; -inf for an empty context.
    """
    (batch, q_heads, tokens, head_dim), (_, kv_heads, page_size, _) = q.shape, k_pages.shape
    pages = page_table.shape[1]
    if 0 in (*q.shape, pages, k_pages.shape[0], page_size):
        return q.new_full(q.shape[:3], -float("inf"), dtype=torch.float32)
    tile = tile or pooled_tile(q.dtype, head_dim, tokens, tokens, page_size)
    steps, row_tiles = _steps(page_size, tile), triton.cdiv(tokens, tile.rows)
    shares, each = _shares(row_tiles * batch * q_heads, pages, steps["SLOTS"])
    logs = torch.empty((batch, q_heads, shares, tokens), dtype=torch.float32, device=q.device)
    _sweep_lse[(row_tiles, batch * q_heads, shares)](
        q, k_pages, logs, page_table, page_lengths, _runs(page_lengths, page_size), *q.stride()[:3],
        *k_pages.stride()[:3], *page_table.stride(), *page_lengths.stride(), tokens, pages, each, shares,
        q_heads, kv_heads, scale * LOG2_E, PAGE=page_size, DIM=head_dim, CHANNELS=padded_dim(head_dim),
        ROWS=tile.rows, **steps, **tile.launch_options(),
    )
    return logs[:, :, 0] if shares == 1 else logs.logsumexp(2)


def pooled_scores(
    q: torch.Tensor, k_pages: torch.Tensor, page_table: torch.Tensor, page_lengths: torch.Tensor,
    span: int, scale: float, lse: torch.Tensor | None = None, *, tile: Tile | None = None,
) -> torch.Tensor:
    """Return the mean softmax mass of each page over each span's rows (clauses POOLED-1 to POOLED-3).

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``, any strides with a contiguous last axis; float16,
        bfloat16 or float32.
    k_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``, any strides with a contiguous last axis.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.
    span : int
        Rows to average over.
    scale : float
        Factor on q.k, positive.
    lse : torch.Tensor, optional
        float32 ``(batch, q_heads, tokens)``: what masses are shares of. Without it the context's own,
        found by a sweep before.
    tile : Tile, optional
        How programs work; chosen from the shape unless given.

    Returns
    -------
    torch.Tensor
        float32 ``(batch, q_heads, spans, pages)``.
    """
    (batch, q_heads, tokens, head_dim), (_, kv_heads, page_size, _) = q.shape, k_pages.shape
    pages, span = page_table.shape[1], min(span, max(tokens, 1))
    spans = -(-tokens // span)
    scores = torch.zeros((batch, q_heads, spans, pages), dtype=torch.float32, device=q.device)
    if 0 in (*q.shape, pages, k_pages.shape[0], page_size):
        return scores
    if lse is None:
        lse = context_lse(q, k_pages, page_table, page_lengths, scale)
    tile = tile or pooled_tile(q.dtype, head_dim, tokens, span, page_size)
    steps = _steps(page_size, tile)
    room = min(triton.next_power_of_2(span), tile.rows)
    together, parts = tile.rows // room, triton.cdiv(span, tile.rows)
    groups = triton.cdiv(spans, together)
    shares, each = _shares(groups * batch * q_heads, pages, steps["SLOTS"])
    sizes: dict[str, Any] = {"SPANS": together, "SPAN_ROOM": room, "MANY": parts > 1}
    _pool[(groups, batch * q_heads, shares)](
        q, k_pages, lse.contiguous(), scores, page_table, page_lengths, _runs(page_lengths, page_size),
        *q.stride()[:3], *k_pages.stride()[:3], *page_table.stride(), *page_lengths.stride(), tokens, span,
        spans, pages, each, parts, q_heads, kv_heads, scale * LOG2_E, PAGE=page_size, DIM=head_dim,
        CHANNELS=padded_dim(head_dim), ROWS=tile.rows, **steps, **sizes,
        **tile.launch_options(),
    )
    return scores
