"""Contexts over caches that stay where they are, whose form changes with every eighth of the length alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparse_dlm_attn import Context
from sparse_dlm_attn_transformers.caches import CachedLayer

__all__ = ["Tables", "bucket_of", "fitting_page_size"]

HostArray = np.ndarray[Any, Any]


def bucket_of(pages: int) -> int:
    """Return to how many pages a context is filled up with absent ones: an eighth more at most, one at least."""
    step = max(1, 1 << max(pages.bit_length() - 4, 0))
    return (pages // step + 1) * step


class Tables:
    """Page tables of one block, made once for all layers whose buffers are alike.

    A page begins where a run of tokens does, or a page's length behind the one before, so pages stay what they are
    when tokens are added. Physical pages begin at every slot of the buffer and overlap.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[HostArray, torch.Tensor, torch.Tensor]] = {}

    def context(self, cached: CachedLayer, valid: HostArray, page_size: int, version: int) -> Context:
        """View buffers as pages.

        Parameters
        ----------
        cached : CachedLayer
            Buffers of one layer.
        valid : numpy.ndarray
            bool ``(batch, tokens)``: which of the first tokens exist.
        page_size : int
            Tokens a page; fewer where a page would reach behind the end of the buffers.
        version : int
            Of the context.
        """
        k, v = cached.keys, cached.values
        if k.stride() != v.stride():
            k, v = k.contiguous(), v.contiguous()
        slots = k.stride(0) // k.stride(2)  # from one sequence to the next
        key = id(valid), slots, page_size, k.device
        if key not in self._made:
            starts, lengths = _pages(valid, page_size)
            table = starts + slots * np.arange(len(valid), dtype=np.int32)[:, None] * (lengths > 0)
            self._made[key] = valid, torch.from_numpy(table).to(k.device), torch.from_numpy(lengths).to(k.device)
        _, table_on_device, lengths_on_device = self._made[key]
        end = (len(valid) - 1) * slots + k.shape[2]
        k_pages, v_pages = (_pages_at_every_slot(part, end, page_size) for part in (k, v))
        return Context(k_pages, v_pages, table_on_device, lengths_on_device, version=version)


def fitting_page_size(cached: CachedLayer, valid: HostArray, page_size: int) -> int:
    """Return a page size, or its half, a quarter ..., at which no page reaches behind the end of the buffers."""
    while page_size > 1 and int(_pages(valid, page_size)[0].max(initial=0)) + page_size > cached.keys.shape[2]:
        page_size //= 2
    return page_size


def _pages(valid: HostArray, page_size: int) -> tuple[HostArray, HostArray]:
    """Return the first slot and the tokens of each page, int32 ``(batch, pages)``, absent ones behind the last."""
    rows = []
    for row in valid:
        edges = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0))
        runs = [(np.arange(start, end, page_size), end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
        starts = np.concatenate([np.empty(0, np.int64), *(first for first, _ in runs)])
        ends = np.concatenate([np.empty(0, np.int64), *(np.minimum(first + page_size, end) for first, end in runs)])
        rows.append((starts, ends - starts))
    width = bucket_of(max(len(starts) for starts, _ in rows))
    table, lengths = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    for b, (starts, counts) in enumerate(rows):
        table[b, : len(starts)], lengths[b, : len(starts)] = starts, counts
    return table, lengths


def _pages_at_every_slot(dense: torch.Tensor, end: int, page_size: int) -> torch.Tensor:
    _, heads, _, channels = dense.shape
    _, head, token, _ = dense.stride()
    return dense.as_strided((max(end - page_size + 1, 1), heads, page_size, channels), (token, head, token, 1))
