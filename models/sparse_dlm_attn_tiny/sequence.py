"""Keys and values of a whole sequence, for models that see all of it: written row by row, read as pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.context import GENERATED, PROMPT, SUFFIX, Context
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn_tiny.config import TinyConfig

__all__ = ["SequenceCache"]

HostArray = np.ndarray[Any, Any]


class SequenceCache:
    """Post-RoPE keys and values of every token of one sequence, for all layers.

    A row that a pass does not compute keeps what the last pass that computed it has written. The tokens
    keep their places, so the version of the contexts stays.

    Parameters
    ----------
    config : TinyConfig
        Architecture that the cache is for.
    backend : Backend
        Whose arrays the cache holds.
    tokens : int
        Length of the sequence.
    prompt_tokens : int
        Tokens at its beginning that count as prompt: a page is of segment ``PROMPT`` if its first token is
        one; the last page never is (the boundary that SparseD's code draws).
    page_size : int
        Tokens a page.
    """

    def __init__(
        self, config: TinyConfig, backend: Backend, *, tokens: int, prompt_tokens: int, page_size: int
    ) -> None:
        check_count("tokens", tokens, 1)
        check_count("page_size", page_size, 1)
        self.tokens, self.prompt_tokens, self.page_size = tokens, prompt_tokens, page_size
        self._backend = backend
        pages = -(-tokens // page_size)
        shape = (1, config.kv_heads, pages * page_size, config.head_dim)
        like = backend.asarray(np.zeros(1, dtype=np.float32), dtype="float32")

        def room() -> list[Array]:
            xp = namespace(like)
            return [xp.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(config.layers)]

        self._keys, self._values = room(), room()
        lengths = backend.asarray(np.array([tokens], dtype=np.int32), dtype="int32")
        self._contexts = tuple(
            Context.from_dense(k, v, page_size, lengths)
            for k, v in zip(self._keys, self._values, strict=True)
        )

    def write(self, layer: int, rows: HostArray, keys: Array, values: Array) -> None:
        """Store keys and values of some rows.

        Parameters
        ----------
        layer : int
            Layer, counted from 0.
        rows : numpy.ndarray
            int64 ``(count,)``: positions.
        keys, values : array
            float32 ``(1, kv_heads, count, head_dim)``.
        """
        self._keys[layer][:, :, rows, :] = keys
        self._values[layer][:, :, rows, :] = values

    def contexts(self, window_end: int) -> tuple[Context, ...]:
        """Return each layer's context; what follows ``window_end`` is of segment ``SUFFIX``.

        Parameters
        ----------
        window_end : int
            Position behind the window that is being filled in.
        """
        first = np.arange(self._contexts[0].pages) * self.page_size
        segments = np.where(first < window_end, GENERATED, SUFFIX)
        segments[first < self.prompt_tokens] = PROMPT
        if segments[-1] == PROMPT:
            segments[-1] = GENERATED
        labels = self._backend.asarray(segments[None].astype(np.int8), dtype="int8")
        return tuple(replace(context, page_segments=labels) for context in self._contexts)


def scattered(values: Array, rows: HostArray, count: int, axis: int) -> Array:
    """Return zeros with ``count`` entries along ``axis``, ``values`` in those that ``rows`` names.

    Parameters
    ----------
    values : array
        Entries of the named rows.
    rows : numpy.ndarray
        int64 ``(named,)``: their places.
    count : int
        Length of the result along ``axis``.
    axis : int
        Axis of the rows.

    Returns
    -------
    array
        Like ``values``; ``values`` itself if all rows are named.
    """
    if len(rows) == count:
        return values
    xp = namespace(values)
    shape = [int(size) for size in values.shape]
    shape[axis] = count
    result = xp.zeros(tuple(shape), dtype=values.dtype, device=values.device)
    places: list[Any] = [slice(None)] * len(shape)
    places[axis] = rows
    result[tuple(places)] = values
    return result
