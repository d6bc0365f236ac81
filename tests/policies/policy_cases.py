"""Blocks to denoise, a small backend for any array library, and the policies with their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparse_dlm_attn import Backend, Context, PassInfo, PrefixAttention
from sparse_dlm_attn.memory import LayerMemory

Array = Any
TOKENS = 6

EVERY_POLICY = (
    "dense",
    "sliding-window:window=7",
    "streaming-llm:sinks=3,window=5,after=2",
    "quest:budget=8,pages=own,newest=true",
    "quest:budget=10,page_count=ceil,union_over=query_head,first_pass=dense",
    "quest:budget=1,min_pages=2,union_over=layer,group_scores=mean",
    "losa:active=2,budget=8",
    "losa:mass=0.5,budget=8,drift=refresh,save_pass=dense",
    "losa:active=3,budget=8,pages=own,first_pass=sparse,save_pass=reuse",
    "flashblock",
    "flashblock:limit=1,dirty_rows=keep,save_pass=reuse",
    "mage:budget=8,dense_layers=0",
    "sparsed",
    "sparsed:warmup=1,ratio=0.2,span=2",
    "sparsed:warmup=0,score_scale=heads",
    "sparsed:warmup=1,frozen=false,span=4",
    "fast-dllm",
    "dkv-cache",
    "sparse-dllm:delay=0",
    "snapkv:capacity=12,window=4",
)


def dyadic(rng: np.random.Generator, shape: tuple[int, ...], largest: int = 16) -> Array:
    """Multiples of 1/8: every sum below is exact in float32, in any order."""
    return (rng.integers(-largest, largest + 1, shape) / 8).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Block:
    """One block to denoise: queries of every pass, keys and values, context, decoded tokens."""

    q: Array  # (passes, batch, q_heads, tokens, head_dim)
    k: Array
    v: Array
    context: Context
    newly: Array  # (passes, batch, tokens)

    @property
    def passes(self) -> int:
        return int(self.q.shape[0])

    def converted(self, convert: Callable[[Array], Array]) -> Block:
        """Return the same block as arrays of another library."""
        c = self.context
        segments = None if c.page_segments is None else convert(c.page_segments)
        context = Context(*map(convert, (c.k_pages, c.v_pages, c.page_table, c.page_lengths)), segments)
        q = [convert(np.ascontiguousarray(rows)) for rows in self.q]
        newly = [convert(np.ascontiguousarray(rows)) for rows in self.newly]
        return replace(self, q=_Passes(q), k=convert(self.k), v=convert(self.v), context=context, newly=newly)


class _Passes(list):  # type: ignore[type-arg]
    """A list that answers `shape` as an array of passes does."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self[0].shape)


def make_block(
    seed: int,
    *,
    batch: int = 2,
    q_heads: int = 4,
    kv_heads: int = 2,
    tokens: int = TOKENS,
    page_size: int = 4,
    pages: int = 9,
    head_dim: int = 8,
    passes: int = 4,
    segments: bool = True,
) -> Block:
    """Return a block over pages shuffled in memory; some are absent or partial, anywhere."""
    rng = np.random.default_rng(seed)
    physical = batch * pages + 2
    shape = (physical, kv_heads, page_size, head_dim)
    table = rng.permutation(physical)[: batch * pages].reshape(batch, pages).astype(np.int32)
    lengths = rng.integers(0, page_size + 1, (batch, pages)).astype(np.int32)
    lengths[:, 1:4] = page_size  # some full ones
    lengths[0, 0], lengths[:, -1] = 0, 1
    labels = np.sort(rng.integers(0, 3, (batch, pages)), axis=1).astype(np.int8) if segments else None
    context = Context(dyadic(rng, shape), dyadic(rng, shape), table, lengths, labels)
    k, v = (dyadic(rng, (batch, kv_heads, tokens, head_dim)) for _ in range(2))
    steps = [dyadic(rng, (batch, q_heads, tokens, head_dim))]
    for _ in range(1, passes):  # rows move by different amounts
        moves = dyadic(rng, steps[0].shape, 4) * rng.integers(0, 2, (batch, 1, tokens, 1))
        steps.append(np.clip(steps[-1] + moves, -3, 3).astype(np.float32))
    newly = rng.random((passes, batch, tokens)) < 0.25
    return Block(np.stack(steps), k, v, context, newly)


def denoise(
    policy: Any,
    block: Block,
    backend: str | Backend = "reference",
    *,
    save: bool = True,
    layer: int = 1,
    total_passes: int | None = None,
) -> Iterator[tuple[Array, LayerMemory]]:
    """Yield output and memory of every pass; the last one is the save pass."""
    attention = PrefixAttention(policy, backend)
    memory = None
    for index in range(block.passes):
        info = PassInfo(
            index,
            is_save=save and index == block.passes - 1,
            newly_decoded=block.newly[index],
            layer=layer,
            num_layers=4,
            total_passes=total_passes,
        )
        out, memory = attention(block.q[index], block.k, block.v, block.context, memory, info)
        yield out, memory


def rows_read(memory: LayerMemory, q_heads: int, tokens: int) -> Array:
    """Return what each row read, bool ``(batch, q_heads, tokens, pages)``; nothing for inactive rows."""
    mask = np.asarray(memory.selection.for_rows(q_heads, tokens))
    exists = np.asarray(memory.page_lengths) > 0
    return mask & np.asarray(memory.active)[:, None, :, None] & exists[:, None, None, :]
