"""Path "gather": copy the selected pages of a KV head, then two products; reads indices on the host.

The rows of all query heads of a group share one copy of the union of their pages; a page that some
of them did not select is masked for those rows. Extra memory is the selected pages of one head a thread,
and nothing where they lie side by side in reading order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn_torch.layout import PageRows
from sparse_dlm_attn_torch.loads import Load, loads_of
from sparse_dlm_attn_torch.threads import WORTH_SHARING, run_parts, threads_for

__all__ = ["attend_pages", "part_bytes"]

ALIGNED = 64  # bytes: where PyTorch's allocator puts a tensor on a processor


def attend_pages(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    page_lengths: torch.Tensor,
    mask: torch.Tensor,
    span: int,
    active: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to selected pages (clause ATTEND-1).

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    k_pages, v_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.
    mask : torch.Tensor
        bool ``(batch, 1 or kv_heads or q_heads, spans, pages)``.
    span : int
        Rows that share a selection.
    active : torch.Tensor
        bool ``(batch, tokens)``.
    scale : float
        Factor on q.k.

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and float32 ``lse`` ``(batch, q_heads, tokens)``.
    """
    (batch, q_heads, tokens, _), (_, kv_heads, page_size, _) = q.shape, k_pages.shape
    dtype, spans = compute_dtype(q), mask.shape[2]
    with threads_for(batch * kv_heads, part_bytes(q, k_pages, page_table)) as workers:
        out = q.new_zeros(q.shape)
        lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
        padded = torch.nn.functional.pad(active, (0, spans * span - tokens))
        used = padded.view(batch, spans, span).any(dim=-1)
        loads = loads_of(mask, used, page_table, page_lengths, page_size, q_heads, kv_heads)
        store = _Store(k_pages, v_pages)
        rows = [each.nonzero()[:, 0] for each in active]
        # Where every row is active, a slice does, which is much quicker than an index.
        queries = [
            (q[b] if each.shape[0] == tokens else q[b].index_select(1, each)).to(dtype) * scale
            for b, each in enumerate(rows)
        ]
        results: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(loads)

        def attend_load(place: int) -> None:
            load = loads[place]
            mine = queries[load.sequence][load.heads].flatten(0, 1)
            keys_values = store.tokens(load.heads.start * kv_heads // q_heads, load)
            results[place] = _attend(mine, keys_values, dtype, _reads(load, rows[load.sequence] // span))

        read = sum(load.count for load in loads) * page_size * q.shape[3]
        run_parts(attend_load, range(len(loads)), workers if read >= WORTH_SHARING else 0)
        for load, result in zip(loads, results, strict=True):
            assert result is not None
            b, shape = load.sequence, (load.heads.stop - load.heads.start, rows[load.sequence].shape[0])
            where = (b, load.heads) if shape[1] == tokens else (b, load.heads, rows[b])
            out[where] = result[0].view(*shape, -1).to(q.dtype)
            lse[where] = result[1].view(shape).to(torch.float32)
    return out, lse


def part_bytes(q: torch.Tensor, k_pages: torch.Tensor, page_table: torch.Tensor) -> int:
    """Return what the scores of a KV head take, if all rows read all pages.

    Parameters
    ----------
    q, k_pages, page_table : torch.Tensor
        As for `attend_pages`.
    """
    rows, tokens = q.shape[1] // k_pages.shape[1] * q.shape[2], page_table.shape[1] * k_pages.shape[2]
    size: int = compute_dtype(q).itemsize
    return rows * tokens * size


def _reads(load: Load, spans: torch.Tensor) -> torch.Tensor | None:
    """Return which page each row of each head reads, ``(heads * rows, count)``; None if all read all."""
    if load.reads is None:
        return None
    heads = load.heads.stop - load.heads.start
    return load.reads.index_select(1, spans).expand(heads, -1, -1).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Keys and values of listed pages, ``(tokens, head_dim)``; slots past a page's length are 0.

    ``valid`` says which slots hold a token, None if all do. ``page_size`` slots make a page.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None
    page_size: int


class _Store:
    """The pages of all heads, read with as little copying as their memory allows."""

    def __init__(self, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
        self.pages = (k_pages, v_pages)
        self.rows = (PageRows.view(k_pages), PageRows.view(v_pages))
        self.page_size = k_pages.shape[2]

    def tokens(self, head: int, load: Load) -> _Tokens:
        """Return the tokens of what is loaded, in reading order."""
        page_size, physical = self.page_size, load.physical
        last_only = load.full_but_last(page_size)
        keys, values = (
            self._run(side, head, load.first, load.first + load.count)
            if load.first is not None and last_only
            else self._copy(side, head, physical)
            for side in (0, 1)
        )
        if load.partial == 0:
            return _Tokens(keys, values, None, page_size)
        if last_only:
            count = (load.count - 1) * page_size + load.last_length
            return _Tokens(keys[:count], values[:count], None, page_size)
        valid = torch.arange(page_size, device=load.lengths.device) < load.lengths[:, None]
        partial = (load.lengths < page_size).nonzero()[:, 0]
        for side in (keys, values):  # copies of our own
            paged = side.view(-1, page_size, side.shape[1])
            paged[partial] = paged[partial].masked_fill(~valid[partial, :, None], 0.0)
        return _Tokens(keys, values, valid.flatten(), page_size)

    def _run(self, side: int, head: int, first: int, end: int) -> torch.Tensor:
        """Return physical pages ``first..end-1``, a view if they lie side by side.

        A product may sum in another order where rows are not aligned as those of a copy are, and then the
        order of pages in memory would show in the last bit (CONTEXT-3).
        """
        rows = self.pages[side][first:end, head].flatten(0, 1)
        step = rows.stride(0) * rows.element_size()
        aligned = rows.data_ptr() % ALIGNED == 0 and (step % ALIGNED == 0 or rows.is_contiguous())
        return rows if aligned else rows.contiguous().clone()

    def _copy(self, side: int, head: int, physical: torch.Tensor) -> torch.Tensor:
        rows = self.rows[side]
        if rows is None:
            return self.pages[side][physical.long(), head].flatten(0, 1)
        index = physical if rows.page_stride == 1 else physical * rows.page_stride
        offset = head * rows.head_stride  # of the matrix, so that the sides share an index
        return rows.rows[offset:].index_select(0, index).view(-1, self.pages[side].shape[3])


def _attend(
    queries: torch.Tensor, tokens: _Tokens, dtype: torch.dtype, reads: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(out, lse)`` of scaled ``queries``; ``reads`` says which pages each row reads."""
    values = tokens.values.to(dtype)
    logits = torch.mm(queries, tokens.keys.to(dtype).t())
    if tokens.valid is not None:
        logits = logits.masked_fill(~tokens.valid, -math.inf)
    if reads is None:
        return _softmax(logits, values)
    allowed = reads.repeat_interleave(tokens.page_size, dim=1)[:, : logits.shape[1]]
    logits = logits.masked_fill(~allowed, -math.inf)
    out, lse = _softmax(logits.clone(), values)
    if not bool(out.isfinite().all()):
        # A value that is not finite must reach only the rows that read it: 0 x NaN is NaN.
        unsafe = ~values.isfinite().all(dim=-1)
        out, _ = _softmax(logits.clone(), values.masked_fill(unsafe[:, None], 0.0))
        for row in (allowed & unsafe).any(dim=-1).nonzero()[:, 0].tolist():
            read = allowed[row]
            out[row] = _softmax(logits[row, read][None], values[read])[0][0]
    return out, lse


def _softmax(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(out, lse)``, and overwrite ``logits``: each pass over them counts where rows are many.

    Keys whose scores are all -inf weigh nothing, as an empty set (STATE-2).
    """
    peak = logits.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)  # never -inf - -inf
    weights = logits.sub_(peak).exp_()  # one exp serves both results
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.mm(weights, values).div_(total).masked_fill_(total == 0, 0.0)
    return out, peak.add_(total.log_())[..., 0]
