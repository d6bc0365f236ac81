"""Pages near the block or at the beginning, by token positions in reading order."""

from __future__ import annotations

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.context import SUFFIX, Context

__all__ = ["nearby_pages"]


def nearby_pages(context: Context, *, window: int, sinks: int = 0, after: int = 0) -> Array:
    """Return the pages that hold a token near the block or one of the first tokens.

    Parameters
    ----------
    context : Context
        Pages before the block and, in segment 2, after it.
    window : int
        Last tokens before the block.
    sinks : int
        First tokens of the context before the block.
    after : int
        First tokens of the suffix.

    Returns
    -------
    array
        bool ``(batch, pages)``. Whole pages, so up to ``page_size - 1`` more tokens at each boundary.

    Notes
    -----
    Positions count valid tokens only, so partial and absent pages may stand anywhere.
    """
    xp = namespace(context.page_lengths)
    capacity = context.pages * context.page_size  # keeps huge parameters within int32
    in_suffix = context.in_segment(SUFFIX)
    lengths = xp.where(in_suffix, xp.zeros_like(context.page_lengths), context.page_lengths)
    ends = xp.cumulative_sum(lengths, axis=-1, dtype=xp.int32)
    total = xp.sum(lengths, axis=-1, keepdims=True, dtype=xp.int32)
    near = (ends > total - min(window, capacity)) | (ends - lengths < min(sinks, capacity))
    before = context.exists & ~in_suffix & near
    if after == 0:
        return before
    lengths = xp.where(in_suffix, context.page_lengths, xp.zeros_like(context.page_lengths))
    starts = xp.cumulative_sum(lengths, axis=-1, dtype=xp.int32) - lengths
    return before | (in_suffix & (starts < min(after, capacity)))
