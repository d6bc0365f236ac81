"""Pages that begin wherever tokens do: views of padded caches.

A page holds its tokens from its first slot on. Padding in front of a sequence therefore does not make a page
partial at its start, it moves the page: physical pages may begin at any token of the memory and overlap.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sparse_dlm_attn.arrays import Array, is_host, namespace, shape_of, strided_view, strides_of, to_numpy
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.values import check_array

__all__ = ["check_valid", "largest_page_size", "shifted_pages"]

HostArray = np.ndarray[Any, Any]


def check_valid(valid: Array, shape: tuple[int, int]) -> HostArray:
    """Return which tokens exist as NumPy.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If it is not a bool array of this shape in host memory.
    """
    check_array("valid", valid, shape, ("bool", "bool_"))
    if not is_host(valid):
        raise InvalidTypeError(
            "valid",
            "must be in host memory, since it decides how many pages there are",
            f"an array on {valid.device}",
            "Copy it once a block: valid.cpu().",
        )
    return to_numpy(valid)


def largest_page_size(valid: HostArray, page_size: int) -> int:
    """Return the largest of ``page_size``, its half, a quarter ... (rounded down) that has a view.

    Only a run of fewer tokens than a page at the very end of the memory makes it smaller.

    Parameters
    ----------
    valid : numpy.ndarray
        bool ``(batch, tokens)``.
    page_size : int
        Tokens a page, at least 1.
    """
    while page_size > 1 and _overhang(valid, page_size, valid.shape[1]) > 0:
        page_size //= 2
    return page_size


def shifted_pages(k: Array, v: Array, page_size: int, valid: HostArray) -> tuple[Array, Array, Array, Array]:
    """View the valid tokens of a dense cache as pages.

    Parameters
    ----------
    k, v : array
        ``(batch, kv_heads, tokens, head_dim)`` of a library with strides.
    page_size : int
        Tokens a page.
    valid : numpy.ndarray
        bool ``(batch, tokens)``.

    Returns
    -------
    tuple of array
        ``k_pages``, ``v_pages``, ``page_table`` and ``page_lengths`` of a `Context`.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If no view exists.
    """
    batch, _, _tokens, _ = shape_of(k)
    jump = _tokens_between_sequences("k", k)
    if jump != _tokens_between_sequences("v", v):
        raise InvalidArgumentError(
            "v", "must be laid out as k is", f"strides {strides_of(v)} beside {strides_of(k)}", "Make both contiguous."
        )
    overhang = _overhang(valid, page_size, jump)
    if overhang > 0:
        raise InvalidArgumentError(
            "page_size",
            "must not exceed the tokens at the end of the last sequence: a page would reach "
            "behind the end of the memory",
            f"{page_size}, {overhang} too many",
            f"Use page_size={largest_page_size(valid, page_size)}, put a longer sequence last, or leave "
            f"room for {overhang} tokens behind it.",
        )
    pages = [_pages_of(row, page_size) for row in valid]
    starts = [[b * jump + start for start, _ in row] for b, row in enumerate(pages)]
    listed = [start for row in starts for start in row]
    # The physical axis need not name every token: steps that all beginnings share keep it short.
    step = math.gcd(page_size, *listed)
    width = max((len(row) for row in pages), default=0)
    table = np.zeros((batch, width), dtype=np.int32)
    lengths = np.zeros((batch, width), dtype=np.int32)
    for b, row in enumerate(pages):
        table[b, : len(row)] = [start // step for start in starts[b]]
        lengths[b, : len(row)] = [count for _, count in row]
    count = max(listed) // step + 1 if listed else 0
    xp = namespace(k)
    return (
        _view(k, count, page_size, step),
        _view(v, count, page_size, step),
        xp.asarray(table, device=k.device),
        xp.asarray(lengths, device=k.device),
    )


def _pages_of(valid: HostArray, page_size: int) -> list[tuple[int, int]]:
    """Return ``(first token, tokens)`` of each page of one sequence, in reading order."""
    edges = np.flatnonzero(np.diff(valid.astype(np.int8), prepend=0, append=0)).tolist()
    pages = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        short = (end - start) % page_size
        if short:
            pages.append((start, short))
        pages += [(first, page_size) for first in range(start + short, end, page_size)]
    return pages


def _overhang(valid: HostArray, page_size: int, jump: int) -> int:
    """Return by how many tokens a page reaches behind the end of the memory; at most 0 if none does."""
    batch, tokens = valid.shape
    most = 0
    for b, row in enumerate(valid):
        reaches = max((first + page_size for first, _ in _pages_of(row, page_size)), default=0)
        most = max(most, reaches - tokens - (batch - 1 - b) * jump)
    return most


def _tokens_between_sequences(name: str, dense: Array) -> int:
    """Return how many tokens lie from one sequence to the next, counted in strides of the token axis."""
    strides = strides_of(dense)
    if strides is None:
        raise InvalidTypeError(
            name,
            "must be a NumPy array or PyTorch tensor to be viewed where tokens begin",
            type(dense).__name__,
            "Pass lengths= instead of valid=, one sequence at a time.",
        )
    sequence, head, token, _ = strides
    batch, heads, tokens, _ = shape_of(dense)
    if batch <= 1:
        sequence = 0
    if heads <= 1:
        head = 0
    uneven = token <= 0 or sequence % max(token, 1) or min(sequence, head) < 0
    # Pages of earlier sequences may reach into the next one, so the next one has to be there.
    backwards = batch > 1 and sequence < token * tokens and sequence != 0
    if tokens and (uneven or backwards):
        raise InvalidArgumentError(
            name,
            "must have a batch stride that is a multiple of its token stride to be viewed as pages",
            f"strides {strides}",
            "Call it on the contiguous cache.",
        )
    return sequence // token if tokens else 0


def _view(dense: Array, count: int, page_size: int, step: int) -> Array:
    """View ``count`` overlapping pages that begin ``step`` tokens after each other."""
    _, kv_heads, _, head_dim = shape_of(dense)
    shape = (count, kv_heads, page_size, head_dim)
    if count == 0:
        return namespace(dense).zeros(shape, dtype=dense.dtype, device=dense.device)
    strides = strides_of(dense)
    assert strides is not None  # asked before
    return strided_view(dense, shape, (step * strides[2], strides[1], strides[2], strides[3]))
