"""One layer of a block-wise DLM over a long paged context: the problem that GPU benchmarks time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from timing import COLD_BYTES

from sparse_dlm_attn import Backend, Context, PassInfo, PrefixAttention

MOST_BYTES = 24 << 30
"""Device memory to take for caches at the most."""

__all__ = ["Layer", "Shape", "budget_for", "layers", "relative_density", "runner"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; ``context`` in tokens."""

    batch: int = 1
    context: int = 65536
    tokens: int = 16
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"

    @property
    def cache_bytes(self) -> int:
        """Bytes of the context's keys and values."""
        size = torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()
        return 2 * self.batch * self.kv_heads * self.context * self.head_dim * size

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the bounds of all pages."""
        return self.cache_bytes // self.page_size

    def __str__(self) -> str:
        return f"B{self.batch} {self.context // 1024}K T{self.tokens} p{self.page_size}"


@dataclass(frozen=True, eq=False)
class Layer:
    """Queries, keys and values of a block, and a dense cache with its view as pages."""

    q: torch.Tensor
    q_next: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor]
    context: Context


def layers(
    shape: Shape, backend: Backend, *, seed: int = 0, shuffled: bool = False, share: float = 0.1
) -> list[Layer]:
    """Make as many layers as it takes to keep the L2 cache cold.

    Parameters
    ----------
    shape : Shape
        Sizes.
    backend : Backend
        Makes the page bounds, once, as an engine does when a page is full.
    seed : int
        Seed of the random numbers.
    share : float
        What the sparsest pass reads of the context.
    shuffled : bool
        Whether pages lie in random order behind a page table, instead of in a dense cache.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    made = []
    wanted = -(-COLD_BYTES // int(shape.cache_bytes * share))
    for _ in range(max(2, min(wanted, MOST_BYTES // shape.cache_bytes))):
        cache = tuple(normal(shape.batch, shape.kv_heads, shape.context, shape.head_dim) for _ in range(2))
        context = Context.from_dense(*cache, shape.page_size)
        if shuffled:
            context = _shuffled(context, shape, cache, generator)
        context = context.with_bounds(backend.page_bounds(context))
        q = normal(shape.batch, shape.q_heads, shape.tokens, shape.head_dim)
        moved = torch.linspace(0.05, 0.5, shape.tokens, device="cuda")[:, None]
        k, v = (normal(shape.batch, shape.kv_heads, shape.tokens, shape.head_dim) for _ in range(2))
        made.append(Layer(q, (q + moved * normal(*q.shape)).to(dtype), k, v, cache, context))
    return made


def _shuffled(
    context: Context, shape: Shape, cache: tuple[Any, ...], generator: torch.Generator
) -> Context:
    pages = shape.context // shape.page_size
    order = torch.randperm(shape.batch * pages, generator=generator, device="cuda")
    pools = [
        side.reshape(shape.batch, shape.kv_heads, pages, shape.page_size, shape.head_dim)
        .transpose(1, 2).flatten(0, 1)[torch.argsort(order)].contiguous() for side in cache
    ]
    return replace(
        context, k_pages=pools[0], v_pages=pools[1], page_table=order.view(shape.batch, pages).to(torch.int32)
    )


def runner(policy: Any, backend: Backend, layer: Layer, index: int = 2, **info: Any) -> Any:
    """Return a function that runs pass ``index`` of a layer again and again, with the memory before it."""
    attention, memory = PrefixAttention(policy, backend), None
    for before in range(index):
        _, memory = attention(layer.q, layer.k, layer.v, layer.context, memory, PassInfo(before, **info))

    def run() -> Any:
        return attention(layer.q_next, layer.k, layer.v, layer.context, memory, PassInfo(index, **info))

    return run


def relative_density(policy: Any, backend: Backend, layer: Layer, index: int = 2) -> float:
    """Return the share of the context that pass ``index`` reads, the mean over sequences."""
    return float(runner(policy, backend, layer, index)()[1].traffic.density.mean())


def budget_for(density: float, name: str, shape: Shape, backend: Backend, layer: Layer) -> tuple[str, float]:
    """Return the smallest budget of a policy that reads at least ``density``, and what it reads."""
    pages = 1
    while True:
        policy = f"{name}budget={pages * shape.page_size}"
        reached = relative_density(policy, backend, layer)
        if reached >= density or pages * shape.page_size >= shape.context:
            return policy, reached
        pages += 1
