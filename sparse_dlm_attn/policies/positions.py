"""Pages near the block or at the beginning, by token positions in reading order."""

from __future__ import annotations

from typing import Any

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.context import SUFFIX, Context
from sparse_dlm_attn.policy import PassInputs
from sparse_dlm_attn.selection import Selection

__all__ = ["band_pages", "nearby_pages", "nearby_selection"]


def nearby_selection(inputs: PassInputs[Any], *, window: int, sinks: int = 0, after: int = 0) -> Selection:
    """Select pages near the block, or near each row where the sequence is the block.

    Parameters
    ----------
    inputs : PassInputs
        Of the pass.
    window, sinks, after : int
        As for `nearby_pages`; for a row of a whole sequence, the tokens up to and including itself, the
        first ones of the sequence, and those behind it.
    """
    if not inputs.whole:
        pages = nearby_pages(inputs.context, window=window, sinks=sinks, after=after)
        return Selection(pages[:, None, None, :], inputs.tokens)
    span = min(inputs.context.page_size, inputs.tokens)
    pages = band_pages(inputs.context, inputs.tokens, span, window=window, sinks=sinks, after=after)
    return Selection(pages[:, None, :, :], span)


def band_pages(context: Context, tokens: int, span: int, *, window: int, sinks: int = 0, after: int = 0) -> Array:
    """Return the pages near each span of a whole sequence's rows, bool ``(batch, spans, pages)``.

    Parameters
    ----------
    context : Context
        The whole sequence.
    tokens, span : int
        Its rows, and how many of them share a selection: what one of them reads, all of them read.
    window : int
        Tokens up to and including the row.
    sinks : int
        First tokens of the sequence.
    after : int
        Tokens behind the row.
    """
    xp = namespace(context.page_lengths)
    ends = context.page_ends[:, None, :]
    starts = ends - context.page_lengths[:, None, :]
    first = xp.arange(0, tokens, span, dtype=xp.int32, device=context.page_lengths.device)[None, :, None]
    last = first + (span - 1)
    # Clamped, so that huge parameters stay within int32.
    near = (ends > first - (min(window, tokens) - 1)) & (starts <= last + min(after, tokens))
    return (near | (starts < min(sinks, tokens))) & context.exists[:, None, :]


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
