"""Windows of a block that is decoded part by part: when one begins, which pages hold it."""

from __future__ import annotations

from sparse_dlm_attn.arrays import Array, namespace, shape_of
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.pass_info import PassInfo
from sparse_dlm_attn.policy import either

__all__ = ["pages_holding", "pool_neighbours", "rows_if", "window_begins"]


def window_begins(info: PassInfo, like: Array) -> bool | Array:
    """Return which sequences begin a window (or the block) in this pass, as a bool if all agree."""
    first: bool | Array = False
    for name, value in (("index", info.index), ("window_index", info.pass_in_window)):
        here = value == 0 if isinstance(value, int) else info.of_sequences(name, like) == 0
        first = either(first, here)
    return first


def rows_if(condition: bool | Array, rows: Array, otherwise: Array) -> Array:
    """Return ``rows`` for sequences where ``condition`` holds, else ``otherwise``; ``(batch, tokens)``."""
    if isinstance(condition, bool):
        return rows if condition else otherwise
    return namespace(rows).where(condition[:, None], rows, otherwise)


def pages_holding(context: Context, rows: Array) -> Array:
    """Return the pages of a whole sequence that hold one of its ``rows``, bool ``(batch, pages)``."""
    xp = namespace(rows)
    counted = xp.cumulative_sum(xp.astype(rows, xp.int32), axis=-1, dtype=xp.int32)
    counted = xp.concat([xp.zeros_like(counted[:, :1]), counted], axis=-1)
    most = int(rows.shape[1])
    ends = xp.clip(context.page_ends, 0, most)
    starts = xp.clip(context.page_ends - context.page_lengths, 0, most)
    places = xp.int64
    inside = xp.take_along_axis(counted, xp.astype(ends, places), axis=-1) - xp.take_along_axis(
        counted, xp.astype(starts, places), axis=-1
    )
    return inside > 0


def pool_neighbours(scores: Array, eligible: Array, half: int, *, largest: bool) -> Array:
    """Pool each page's score with those of ``half`` eligible neighbours on either side.

    Parameters
    ----------
    scores : array
        float32 ``(batch, heads, spans, pages)``.
    eligible : array
        bool ``(batch, pages)``: pages that take part; the others are stepped over.
    half : int
        Neighbours on each side; 0 changes nothing.
    largest : bool
        Whether to take the maximum; otherwise the sum (which ranks as the mean over a zero-padded
        kernel does).

    Returns
    -------
    array
        Like ``scores``; entries of pages that are not eligible carry no meaning.
    """
    xp = namespace(scores)
    pages = shape_of(scores)[-1]
    if half == 0 or pages == 0:
        return scores
    order = xp.argsort(xp.astype(~eligible, xp.int32), axis=-1, stable=True)
    inverse = xp.argsort(order, axis=-1, stable=True)
    shape = shape_of(scores)

    def moved(values: Array, places: Array) -> Array:
        return xp.take_along_axis(values, xp.broadcast_to(places[:, None, None, :], shape), axis=-1)

    outside = -xp.inf if largest else 0.0
    counted = xp.sum(xp.astype(eligible, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
    inside = xp.arange(pages, dtype=xp.int32, device=scores.device)[None, :] < counted
    packed = xp.where(inside[:, None, None, :], moved(scores, order), outside)
    pooled = packed
    for step in range(1, min(half, pages - 1) + 1):
        edge = xp.full_like(packed[..., :step], outside)
        left = xp.concat([edge, packed[..., : pages - step]], axis=-1)
        right = xp.concat([packed[..., step:], edge], axis=-1)
        pooled = xp.maximum(pooled, xp.maximum(left, right)) if largest else pooled + left + right
    return moved(pooled, inverse)
