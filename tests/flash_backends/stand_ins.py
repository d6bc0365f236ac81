"""Plain PyTorch with the documented contracts of flash-attn's and FlashInfer's functions, for a CPU.

They are as strict as the contracts, and as careless: what lies behind a page's last token is multiplied
by 0, so that NaN there would show, and so is what lies behind the last key of a request, up to a tile of
keys. Those of flash-attn return rows of a sum that is NaN as rows of no keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sparse_dlm_attn.capabilities import Capabilities, Problem
from sparse_dlm_attn_flash import FlashAttentionBackend, FlashInferBackend
from sparse_dlm_attn_flash.flash_attn import packed_call, paged_call
from sparse_dlm_attn_flash.flashinfer import paged_call as planned_call

TILE = 128  # keys that a kernel multiplies at a time


def softmax(q: Any, k: Any, v: Any, count: int, scale: float) -> tuple[Any, Any]:
    """Attend ``(rows, dim)`` to the first ``count`` of all keys given; the others weigh 0."""
    logits = (q.double() @ k.double().T) * scale
    logits[:, count:] = -math.inf
    lse = logits.logsumexp(-1)
    weights = (logits - torch.where(lse.isneginf(), 0.0, lse)[:, None]).exp()
    return (weights @ v.double()).to(q.dtype), lse.float()


def hiding(q: Any, k: Any, v: Any, count: int, scale: float) -> tuple[Any, Any]:
    """Do as `softmax` does, but drop NaN as flash-attn does."""
    out, lse = softmax(q, k, v, count, scale)
    return out.masked_fill(lse.isnan()[:, None], 0.0), lse.masked_fill(lse.isnan(), -math.inf)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    assert q.ndim == k.ndim == 3
    assert k.shape[1] == 1
    assert not causal
    assert softmax_scale
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_k[-1] == len(k)
    assert cu_seqlens_q[-1] == len(q)
    assert cu_seqlens_q.diff().max() == max_seqlen_q
    assert cu_seqlens_k.diff().max() == max_seqlen_k
    parts = []
    for number in range(len(cu_seqlens_q) - 1):
        rows = slice(*cu_seqlens_q[number : number + 2].tolist())
        keys = slice(*cu_seqlens_k[number : number + 2].tolist())
        count = keys.stop - keys.start
        tiles = slice(keys.start, keys.start - (-count // TILE) * TILE)
        parts.append(hiding(q[rows, 0], k[tiles, 0], v[tiles, 0], count, softmax_scale))
    out, lse = (torch.cat(side) for side in zip(*parts, strict=True))
    return (out[:, None], lse[None], None) if return_attn_probs else out[:, None]


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    cache_seqlens: Any,
    block_table: Any,
    softmax_scale: float,
    causal: bool = False,
    return_softmax_lse: bool = False,
) -> Any:
    assert q.ndim == k_cache.ndim == 4
    assert k_cache.shape[2] == 1
    assert not causal
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    out, lse = torch.empty_like(q), q.new_empty((q.shape[0], 1, q.shape[1]), dtype=torch.float32)
    for number, length in enumerate(cache_seqlens.tolist()):
        pages = block_table[number].long()
        keys, values = (cache[pages, :, 0].flatten(0, 1) for cache in (k_cache, v_cache))
        out[number, :, 0], lse[number, 0] = hiding(q[number, :, 0], keys, values, length, softmax_scale)
    assert return_softmax_lse
    return out, lse


class PrefillWrapper:
    """The part of ``BatchPrefillWithPagedKVCacheWrapper`` that is used, for layout HND."""

    def plan(
        self,
        qo_indptr: Any,
        paged_kv_indptr: Any,
        paged_kv_indices: Any,
        paged_kv_last_page_len: Any,
        *,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: Any,
        kv_data_type: Any,
    ) -> None:
        assert num_qo_heads == num_kv_heads == 1
        assert not causal
        assert q_data_type == kv_data_type
        lists = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(part.dtype == torch.int32 for part in lists)
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        assert (paged_kv_indptr.diff() > 0).all()
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        self.lists, self.size, self.dim, self.scale = lists, page_size, head_dim_qk, sm_scale

    def run(self, q: Any, cache: Any, *, return_lse: bool) -> Any:
        assert return_lse
        assert q.shape[1:] == (1, self.dim)
        assert all(side.shape[1:] == (1, self.size, self.dim) for side in cache)
        starts, first, indices, last = self.lists
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        for number in range(len(last)):
            rows = slice(*starts[number : number + 2].tolist())
            pages = indices[slice(*first[number : number + 2].tolist())].long()
            keys, values = (side[pages, 0].flatten(0, 1) for side in cache)
            count = (len(pages) - 1) * self.size + int(last[number])
            out[rows, 0], lse[rows, 0] = softmax(q[rows, 0], keys, values, count, self.scale)
        return out, lse / math.log(2.0)  # its base is 2


class _OnHost:
    """A backend whose kernel is a stand-in on the CPU."""

    device = "cpu"

    def __init__(self) -> None:
        self.pages, self.module = "packed", "stand-in"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("float32", "bfloat16", "float16"), devices=("cpu",))

    def why_not(self, problem: Problem) -> list[str]:
        return self.capabilities.why_not(problem)


class Packed(_OnHost, FlashAttentionBackend):
    def run(self, q: Any, pool: Any, requests: Any, scale: float) -> Any:
        return packed_call(flash_attn_varlen_func, q, pool, requests, scale)


class Paged(_OnHost, FlashAttentionBackend):
    def run(self, q: Any, pool: Any, requests: Any, scale: float) -> Any:
        return paged_call(flash_attn_with_kvcache, q, pool, requests, scale)


class Planned(_OnHost, FlashInferBackend):
    workspace, kernel = 1 << 20, "fa3"

    def run(self, q: Any, pool: Any, requests: Any, scale: float) -> Any:
        return planned_call(PrefillWrapper(), q, pool, requests, scale)
