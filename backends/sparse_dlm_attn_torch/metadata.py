"""Page bounds, page scores and ranking. Nothing here synchronises with a device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn.torch_backend import bound_scores
from sparse_dlm_attn_torch.threads import run_parts, threads_for

__all__ = ["page_bounds", "page_scores", "pooled_scores", "ranked_pages", "top_pages"]

CHUNK_BYTES = 32 << 20  # of gathered keys at a time: extra memory does not grow with the context


def page_bounds(
    k_pages: torch.Tensor, page_table: torch.Tensor, page_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return minimum and maximum of each page's valid keys (clause BOUNDS-1).

    Parameters
    ----------
    k_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.

    Returns
    -------
    tuple of torch.Tensor
        ``(batch, kv_heads, pages, head_dim)`` each, 0 for absent pages.
    """
    (batch, pages), (_, heads, _, head_dim) = page_table.shape, k_pages.shape
    lower = k_pages.new_zeros((batch, heads, pages, head_dim))
    upper = torch.zeros_like(lower)
    if 0 in (batch, k_pages.shape[0]):  # no page exists
        return lower, upper
    at_once = pages_at_once(k_pages)
    if k_pages.device.type == "cpu":
        for b in range(batch):
            _bounds_on_host(k_pages, page_table[b], page_lengths[b], lower[b], upper[b])
        return lower, upper
    for b in range(batch):
        for start in range(0, pages, at_once):
            part = slice(start, start + at_once)
            keys, valid = gather_keys(k_pages, page_table[b : b + 1, part], page_lengths[b : b + 1, part])
            absent, missing = ~valid[0, :, None, :, None], ~valid[0, :, None, :1]
            smallest = keys[0].masked_fill(absent, math.inf).amin(dim=2)
            largest = keys[0].masked_fill(absent, -math.inf).amax(dim=2)
            lower[b, :, part] = smallest.masked_fill(missing, 0).transpose(0, 1)
            upper[b, :, part] = largest.masked_fill(missing, 0).transpose(0, 1)
    return lower, upper


def _bounds_on_host(
    k_pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor
) -> None:
    """Fill in the bounds of one sequence, whole pages where they lie and the others one by one."""
    at_once, size = pages_at_once(k_pages), k_pages.shape[2]
    whole = (lengths == size).nonzero()[:, 0]
    for places in torch.split(whole, at_once) if whole.numel() else ():
        physical = table[places]
        first, last = int(physical[0]), int(physical[-1])
        if last - first + 1 == physical.numel() and bool((physical.diff() == 1).all()):
            keys = k_pages[first : last + 1]
        else:
            keys = k_pages.index_select(0, physical)
        lower[:, places] = keys.amin(dim=2).transpose(0, 1)
        upper[:, places] = keys.amax(dim=2).transpose(0, 1)
    for place in ((lengths > 0) & (lengths < size)).nonzero()[:, 0].tolist():
        keys = k_pages[int(table[place]), :, : int(lengths[place])]
        lower[:, place], upper[:, place] = keys.amin(dim=1), keys.amax(dim=1)


def pages_at_once(k_pages: torch.Tensor) -> int:
    """Return how many pages of all heads to gather at a time."""
    size = k_pages[0].numel() * max(k_pages.element_size(), 4)
    return max(CHUNK_BYTES // size, 1)


def gather_keys(k_pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy pages, ``(batch, pages, kv_heads, page_size, head_dim)``, and say which slots hold a token."""
    exists = lengths > 0
    physical = torch.where(exists, table, 0)
    keys = k_pages.index_select(0, physical.flatten())
    slots = torch.arange(k_pages.shape[2], device=k_pages.device)
    return keys.view(*table.shape, *k_pages.shape[1:]), slots < lengths[..., None]


def page_scores(q: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
    """Return ``relu(q) . upper + min(q, 0) . lower``, one pair of products a KV head (SCORES-1).

    On the host only active rows are multiplied, and the others get 0; on a device finding them would
    synchronise, and two products are cheap there.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    lower, upper : torch.Tensor
        ``(batch, kv_heads, pages, head_dim)``.
    active : torch.Tensor or None
        bool ``(batch, tokens)``; None for all rows.

    Returns
    -------
    torch.Tensor
        float32 ``(batch, q_heads, tokens, pages)``.
    """
    if active is None or q.device.type != "cpu":
        return bound_scores(q, lower, upper)
    batch, kv_heads, pages, _ = lower.shape
    group = q.shape[1] // kv_heads
    shape = (*q.shape[:3], pages)
    part_bytes = 4 * math.prod(shape) // max(batch * kv_heads, 1)
    with threads_for(batch * kv_heads, part_bytes, 2 * lower.numel()) as workers:
        scores = q.new_zeros(shape, dtype=torch.float32)

        def score(part: tuple[int, torch.Tensor, slice]) -> None:
            b, rows, heads = part
            of_group = slice(heads.start * group, heads.stop * group)
            sides = (side[b : b + 1, heads] for side in (lower, upper))
            scores[b, of_group, rows] = bound_scores(q[b : b + 1, of_group].index_select(2, rows), *sides)[0]

        run_parts(score, _head_parts(active, kv_heads, workers), workers)
    return scores


def _head_parts(active: torch.Tensor, kv_heads: int, workers: int) -> list[tuple[int, torch.Tensor, slice]]:
    """Divide sequences with active rows among threads: sequence, its active rows, some KV heads."""
    step = -(-kv_heads // (workers + 1))
    heads = [slice(first, min(first + step, kv_heads)) for first in range(0, kv_heads, step)]
    rows = [row.nonzero()[:, 0] for row in active]
    return [(b, mine, some) for b, mine in enumerate(rows) if mine.numel() for some in heads]


def top_pages(scores: torch.Tensor, count: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """Return the mask of the ``count`` best eligible pages, the lowest index first among equals (TOP-1).

    The value of the last page taken is the cut: everything above it is in, and of those equal to it the
    first ones. So values are sorted, not indices, and ties need no stable sort.

    Parameters
    ----------
    scores : torch.Tensor
        ``(..., pages)``.
    count : torch.Tensor
        Integers that broadcast to ``(...)``.
    eligible : torch.Tensor
        bool, broadcasts to the shape of ``scores``.

    Returns
    -------
    torch.Tensor
        bool, like ``scores``.
    """
    if 0 in scores.shape:
        return torch.zeros_like(scores, dtype=torch.bool)
    count = count.to(torch.int64).expand(scores.shape[:-1])
    eligible = eligible.expand(scores.shape)
    if scores.device.type != "cpu":
        return _top(scores, count, eligible, None)
    pages = scores.shape[-1]
    part_bytes, costs = pages * scores.element_size(), 8 * scores.numel()  # an element ranked is dearer
    with threads_for(scores.shape[:-1].numel(), part_bytes, costs) as workers:
        chosen = scores.new_zeros(scores.shape, dtype=torch.bool)
        flat = [part.reshape(-1, width) for part, width in ((scores, pages), (eligible, pages), (count, 1))]

        def choose(rows: torch.Tensor) -> None:
            values, allowed, wanted = (part.index_select(0, rows) for part in flat)
            most = min(max(int(wanted.max()), 0), pages)
            chosen.view(-1, pages)[rows] = _top(values, wanted[:, 0], allowed, most)

        rows = eligible.any(-1).flatten().nonzero()[:, 0]  # rows that may take a page at all
        run_parts(choose, rows.chunk(workers + 1) if rows.numel() else (), workers)
    return chosen


def ranked_pages(
    q: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    active: torch.Tensor,
    exists: torch.Tensor,
    count: torch.Tensor,
    per_query_head: bool,
) -> torch.Tensor:
    """Return the union of the best pages of active rows, on the host: `page_scores`, `top_pages` and a union.

    Nothing is made for inactive rows, and a KV head is done with before the next one begins.

    Parameters
    ----------
    q, lower, upper : torch.Tensor
        As for `page_scores`.
    active, exists : torch.Tensor
        bool ``(batch, tokens)`` and ``(batch, pages)``.
    count : torch.Tensor
        int32 ``(batch,)``: pages that a row takes.
    per_query_head : bool
        Whether heads are united, too, or each query head has its own union.

    Returns
    -------
    torch.Tensor
        bool ``(batch, q_heads or kv_heads, 1, pages)``.
    """
    (batch, q_heads, tokens, _), (_, kv_heads, pages, _) = q.shape, lower.shape
    group = q_heads // kv_heads
    lists = group if per_query_head else 1  # a KV head
    with threads_for(batch * kv_heads, 4 * group * tokens * pages, 2 * lower.numel()) as workers:
        mask = q.new_zeros((batch, kv_heads * lists, 1, pages), dtype=torch.bool)

        def choose(part: tuple[int, torch.Tensor, slice]) -> None:
            b, rows, heads = part
            queries = q[b : b + 1, heads.start * group : heads.stop * group].index_select(2, rows)
            scores = bound_scores(queries, lower[b : b + 1, heads], upper[b : b + 1, heads]).view(-1, pages)
            own = _top(
                scores,
                count[b].long().expand(scores.shape[0]),
                exists[b].expand(scores.shape),
                min(int(count[b]), pages),
            )
            united = own.view((heads.stop - heads.start) * lists, -1, pages).any(dim=1)
            mask[b, heads.start * lists : heads.stop * lists, 0] = united

        run_parts(choose, _head_parts(active, kv_heads, workers) if pages else (), workers)
    return mask


def _top(scores: torch.Tensor, count: torch.Tensor, eligible: torch.Tensor, most: int | None) -> torch.Tensor:
    if scores.is_floating_point():
        lowest: float | int = -math.inf
        scores = torch.where(scores.isnan(), math.inf, scores)
    else:
        lowest = torch.iinfo(scores.dtype).min
    keys = torch.where(eligible, scores, lowest)
    wanted = torch.minimum(count.clamp(min=0), eligible.sum(-1))[..., None]
    # An eligible page may score the lowest value itself; the cut is right all the same, since no more
    # pages are wanted than are eligible.
    ranked = keys.sort(dim=-1, descending=True).values if most is None else keys.topk(max(most, 1), dim=-1).values
    cut = ranked.gather(-1, (wanted - 1).clamp(min=0))
    if most is not None:  # on the host: where nothing ties with the cut, all is decided
        reached = eligible & (keys >= cut) & (wanted > 0)
        if bool((reached.sum(-1, keepdim=True) == wanted).all()):
            return reached
    above, equal = eligible & (keys > cut), eligible & (keys == cut)
    room = wanted - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & (wanted > 0)


def pooled_scores(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    page_lengths: torch.Tensor,
    span: int,
    scale: float,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """Return the mean softmax mass of each page over each span's rows (clause POOLED-1).

    One look at the keys, a chunk of pages at a time: the log of a page's sum of exponentials, then the
    share of each page in ``lse``, which is their total unless it is given.

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    k_pages, page_table, page_lengths : torch.Tensor
        As for `page_bounds`.
    span : int
        Rows to average over.
    scale : float
        Factor on q.k.
    lse : torch.Tensor or None
        float32 ``(batch, q_heads, tokens)``.

    Returns
    -------
    torch.Tensor
        float32 ``(batch, q_heads, spans, pages)``.
    """
    batch, q_heads, tokens, _ = q.shape
    pages, spans, dtype = page_table.shape[1], -(-tokens // span), compute_dtype(q)
    sums = torch.zeros((batch, q_heads, spans, pages), dtype=dtype, device=q.device)
    if 0 in (*sums.shape, k_pages.shape[0]):
        return sums.to(torch.float32)
    for first, last in _row_parts(tokens, span, batch * q_heads * pages * sums.element_size()):
        logs = _page_logs(q[:, :, first:last].to(dtype) * scale, k_pages, page_table, page_lengths)
        total = logs.logsumexp(-1) if lse is None else lse[:, :, first:last].to(dtype)
        # Rows whose every score is -inf weigh nothing; they must not become -inf - -inf.
        # And no mass exceeds 1, whatever the LSE; NaN stays.
        mass = (logs - torch.where(total.isneginf(), 0.0, total)[..., None]).exp_().clamp_(max=1.0)
        here = slice(first // span, (last - 1) // span + 1)
        sums[:, :, here] += torch.stack([part.sum(2) for part in torch.split(mass, span, dim=2)], dim=2)
    sizes = (tokens - torch.arange(spans, device=q.device) * span).clamp(max=span)
    return (sums / sizes[:, None]).to(torch.float32)


def _row_parts(tokens: int, span: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of little memory: several whole spans, or pieces of one."""
    most = max(CHUNK_BYTES // row_bytes, 1)
    if most >= span:
        step = most // span * span
        yield from ((first, min(first + step, tokens)) for first in range(0, tokens, step))
        return
    for start in range(0, tokens, span):
        end = min(start + span, tokens)
        yield from ((first, min(first + most, end)) for first in range(start, end, most))


def _page_logs(q: torch.Tensor, k_pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the log of each page's sum of exponentials, ``(batch, q_heads, rows, pages)``."""
    (batch, q_heads, tokens, head_dim), kv_heads = q.shape, k_pages.shape[1]
    rows = q.reshape(batch, kv_heads, q_heads // kv_heads * tokens, head_dim)
    scores = batch * q_heads * tokens * k_pages.shape[2] * q.element_size()
    at_once = min(max(pages_at_once(k_pages) // batch, 1), max(CHUNK_BYTES // scores, 1))
    logs = []
    for start in range(0, table.shape[1], at_once):
        part = slice(start, start + at_once)
        keys, valid = gather_keys(k_pages, table[:, part], lengths[:, part])
        keys = keys.to(rows.dtype).permute(0, 2, 4, 1, 3).flatten(3)  # (batch, heads, head_dim, tokens)
        logits = rows @ keys
        logits = logits.view(*logits.shape[:-1], *valid.shape[1:])
        logs.append(logits.masked_fill(~valid[:, None, None], -math.inf).logsumexp(-1))
    return torch.cat(logs, dim=-1).view(batch, q_heads, tokens, -1)
