"""Other people's kernels over the page lists that a policy chose: context attention of the active rows alone.

What they leave out is on their side: gathering the active rows, the block, the merge with cached states. Host
planning, which FlashInfer needs for every new selection, is timed apart.
"""

from __future__ import annotations

import importlib
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sparse_dlm_attn import Context, Selection
from sparse_dlm_attn_benchmarks.flex_peer import flex_masked, listed_mask
from sparse_dlm_attn_benchmarks.layer import Layer
from sparse_dlm_attn_benchmarks.peers import (
    WORKSPACE,
    Pair,
    Peer,
    Work,
    differing,
    flash_attn_3,
    reason,
    wait,
    wrapper_for,
)
from sparse_dlm_attn_benchmarks.shape import Shape
from sparse_dlm_attn_flash.flash_attn import build_flags
from sparse_dlm_attn_flash.folding import Pool, Requests, folded, full_pages, rows_of_lists
from sparse_dlm_attn_torch import TorchBackend
from sparse_dlm_attn_torch.layout import Lists, lists_of

__all__ = ["SPARSE", "Chosen", "Found", "sparse_peers"]


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a pass selected in one layer."""

    layer: Layer  # inputs; whole pages only
    mask: torch.Tensor  # bool ``(batch, kv_heads, 1, pages)``
    active: torch.Tensor  # bool ``(batch, tokens)``, equally many rows in every sequence

    @property
    def context(self) -> Context:
        """The layer's pages."""
        return self.layer.context

    def selection(self) -> Selection:
        """Return the selection, one for the block."""
        return Selection(self.mask, self.layer.q.shape[2])

    def rows(self) -> torch.Tensor:
        """Return the active queries, ``(batch, q_heads, active rows, head_dim)``, contiguous."""
        q = self.layer.q_next.transpose(1, 2)[self.active]
        batch, heads, _, dim = self.layer.q_next.shape
        return q.view(batch, -1, heads, dim).transpose(1, 2).contiguous()

    def expected(self) -> Pair:
        """Return ``(out, lse)`` of the active rows by the PyTorch backend's plain path."""
        plain = TorchBackend(device=str(self.layer.q.device), attention="masked")
        state = plain.attend_pages(self.layer.q_next, self.context, self.selection(), self.active)
        shape = self.rows().shape
        rows = self.active[:, None].expand(state.lse.shape)
        return state.out[rows].view(shape).float(), state.lse[rows].view(shape[:3])

    def requests(self) -> tuple[Pool, Requests]:
        """Return the lists as requests to a paged cache of one head; reads them on the host."""
        pool = folded(self.context, "peer")
        lists = rows_of_lists(self.context, self.selection(), self.active, self.layer.q.shape[1])
        found = full_pages(self.context, lists, pool)
        if found is None:
            raise ValueError("nothing was selected")
        return pool, found


@dataclass(frozen=True)
class Found:
    """A peer that can run."""

    works: list[Work]  # one a layer
    # Host microseconds to plan one layer's selection, its lists known; None if there is no plan.
    plan_us: float | None = None


def _flashinfer(chosen: Sequence[Chosen], shape: Shape) -> Found:
    device = chosen[0].layer.q.device
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)  # layers run one after the other
    works: list[Work] = []
    planned = []
    for one in chosen:
        pool, requests = one.requests()
        q = one.layer.q_next.reshape(-1, 1, shape.head_dim)[requests.rows]
        wrapper = wrapper_for(device, workspace)
        wait(device)
        start = time.perf_counter()
        wrapper.plan(
            requests.row_starts,
            requests.page_starts,
            requests.pages,
            requests.last_lengths,
            num_qo_heads=1,
            num_kv_heads=1,
            head_dim_qk=shape.head_dim,
            page_size=shape.page_size,
            causal=False,
            sm_scale=shape.head_dim**-0.5,
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
        )
        wait(device)
        planned.append((time.perf_counter() - start) * 1e6)
        pages = pool.k[:, None], pool.v[:, None]
        works.append(partial(wrapper.run, q, pages, return_lse=True))
    return Found(works, sorted(planned)[len(planned) // 2])


def _flex(chosen: Sequence[Chosen], shape: Shape) -> Found:
    works: list[Work] = []
    for one in chosen:
        lists = lists_of(one.mask.transpose(1, 2), shape.tokens)
        own = Lists(  # (batch, kv_heads, one block of rows, width)
            lists.pages.transpose(1, 2).to(torch.int32).contiguous(),
            lists.counts.transpose(1, 2).to(torch.int32).contiguous(),
            lists.span,
        )
        q = one.rows().reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
        block = max(128, 1 << (q.shape[2] - 1).bit_length()), shape.page_size

        mask = listed_mask((q.shape[2], shape.context), own, block)
        works.append(partial(flex_masked, q, *one.layer.cache, mask, shape.head_dim**-0.5))
    return Found(works)


def _paged(function: Callable[..., Any], chosen: Sequence[Chosen], shape: Shape) -> Found:
    """Give ``flash_attn_with_kvcache`` a block table a (sequence, KV head)."""
    name = "page_table" if "page_table" in inspect.signature(function).parameters else "block_table"
    works: list[Work] = []
    for one in chosen:
        pool, requests = one.requests()
        table = requests.block_table()
        q = one.layer.q_next.reshape(-1, shape.head_dim)[requests.rows]
        q = q.view(len(requests), -1, 1, shape.head_dim)
        lengths = requests.lengths(shape.page_size).to(table.device)
        options = {
            name: table,
            "cache_seqlens": lengths,
            "return_softmax_lse": True,
            "softmax_scale": shape.head_dim**-0.5,
        }

        def run(q: Any = q, pool: Pool = pool, options: Any = options) -> Pair:
            out, lse = function(q, pool.k[:, :, None], pool.v[:, :, None], **options)[:2]
            return out, lse

        works.append(run)
    return Found(works)


def _flash_attn_2(chosen: Sequence[Chosen], shape: Shape) -> Found:
    if shape.page_size % 256:
        raise NotImplementedError("flash-attn 2 wants pages of a multiple of 256 tokens")
    return _paged(importlib.import_module("flash_attn").flash_attn_with_kvcache, chosen, shape)


def _flash_attn_3(chosen: Sequence[Chosen], shape: Shape) -> Found:
    module = flash_attn_3()
    if build_flags(module.__name__).get("FLASHATTENTION_DISABLE_PAGEDKV"):
        raise NotImplementedError(f"{module.__name__} was built without paged KV")
    return _paged(module.flash_attn_with_kvcache, chosen, shape)


@dataclass(frozen=True)
class _SparsePeer:
    make: Callable[[Sequence[Chosen], Shape], Found]
    log_base: float = math.e


SPARSE: dict[str, _SparsePeer] = {
    "FlashInfer paged, heads folded": _SparsePeer(_flashinfer, log_base=2.0),
    "FlexAttention, block mask": _SparsePeer(_flex),
    "flash-attn 2 paged, heads folded": _SparsePeer(_flash_attn_2),
    "flash-attn 3 paged, heads folded": _SparsePeer(_flash_attn_3),
}


def sparse_peers(
    chosen: Sequence[Chosen], shape: Shape, names: Sequence[str] = tuple(SPARSE)
) -> dict[str, Found | str]:
    """Return for each peer its work on every layer's lists, or in words why it is not there."""
    found: dict[str, Found | str] = {}
    wanted = chosen[0].expected()
    for name in names:
        peer = SPARSE[name]
        try:
            made = peer.make(chosen, shape)
            reader = Peer(lambda layers, shape: [], peer.log_base)
            wrong = differing(reader, made.works[0](), wanted, shape.dtype)
            wait(chosen[0].layer.q.device)
        except Exception as error:  # whatever a missing or unfit library raises
            found[name] = reason(error)
        else:
            found[name] = wrong or made
    return found
