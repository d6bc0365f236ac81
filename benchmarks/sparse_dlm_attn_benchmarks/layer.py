"""One layer of a block-wise DLM over a long paged context: the problem that is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_dlm_attn import Backend, Context, InvalidArgumentError, PassInfo, PrefixAttention
from sparse_dlm_attn_benchmarks.shape import Shape, with_budget
from sparse_dlm_attn_benchmarks.timing import COLD_BYTES

__all__ = ["Layer", "budget_for", "layers", "relative_density", "runner"]

MOST_BYTES = 24 << 30
"""Device memory to take for caches at the most, and half of what is free."""


@dataclass(frozen=True, eq=False)
class Layer:
    """Queries of two passes, keys and values of a block, and a dense cache with its view as pages."""

    q: torch.Tensor
    q_next: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor]
    context: Context


def layers(
    shape: Shape, backend: Backend, *, seed: int = 0, shuffled: bool = False, share: float = 0.1, device: str = "cuda"
) -> list[Layer]:
    """Make two layers or more, as many as it takes to keep the L2 cache cold.

    ``shuffled`` pages lie in random order behind a page table, instead of in a dense cache; ``share`` is what the
    sparsest pass reads of the context. Raise `InvalidArgumentError` if two do not fit the GPU's free memory.
    """
    room = min(MOST_BYTES, torch.cuda.mem_get_info()[0] // 2) if device == "cuda" else MOST_BYTES
    if 2 * shape.cache_bytes > room:
        raise InvalidArgumentError(
            "context",
            f"must fit two layers' caches into {room >> 20} MiB, half of the GPU's free memory",
            f"{shape.cache_bytes >> 20} MiB each for {shape}",
            "Shorten it, or use fewer sequences.",
        )
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(dtype)

    made = []
    wanted = -(-COLD_BYTES // max(int(shape.cache_bytes * share), 1))
    for _ in range(max(2, min(wanted, room // shape.cache_bytes))):
        sides = (shape.batch, shape.kv_heads, shape.context, shape.head_dim)
        cache = normal(*sides), normal(*sides)
        context = Context.from_dense(*cache, shape.page_size)
        if shuffled:
            context = _shuffled(context, shape, cache, generator)
        context = context.with_bounds(backend.page_bounds(context))
        q = normal(shape.batch, shape.q_heads, shape.tokens, shape.head_dim)
        moved = torch.linspace(0.05, 0.5, shape.tokens, device=device)[:, None]
        k, v = (normal(shape.batch, shape.kv_heads, shape.tokens, shape.head_dim) for _ in range(2))
        made.append(Layer(q, (q + moved * normal(*q.shape)).to(dtype), k, v, cache, context))
    return made


def _shuffled(context: Context, shape: Shape, cache: tuple[torch.Tensor, ...], generator: torch.Generator) -> Context:
    pages = shape.context // shape.page_size
    order = torch.randperm(shape.batch * pages, generator=generator, device=generator.device)
    pools = [
        side.reshape(shape.batch, shape.kv_heads, pages, shape.page_size, shape.head_dim)
        .transpose(1, 2)
        .flatten(0, 1)[torch.argsort(order)]
        .contiguous()
        for side in cache
    ]
    return replace(
        context, k_pages=pools[0], v_pages=pools[1], page_table=order.view(shape.batch, pages).to(torch.int32)
    )


def runner(policy: Any, backend: Backend, layer: Layer, index: int = 2, /, **info: Any) -> Callable[[], Any]:
    """Return a function that runs pass ``index`` of a layer again and again, with the memory before it."""
    attention, memory = PrefixAttention(policy, backend), None
    for before in range(index):
        _, memory = attention(layer.q, layer.k, layer.v, layer.context, memory, PassInfo(before, **info))

    def run() -> Any:
        return attention(layer.q_next, layer.k, layer.v, layer.context, memory, PassInfo(index, **info))

    return run


def relative_density(policy: Any, backend: Backend, layer: Layer, index: int = 2, /, **info: Any) -> float:
    """Return the share of the context that pass ``index`` reads, the mean over sequences."""
    return float(runner(policy, backend, layer, index, **info)()[1].traffic.density.mean())


def budget_for(
    density: float, policy: str, shape: Shape, backend: Backend, layer: Layer, /, **info: Any
) -> tuple[str, float]:
    """Return the smallest budget with which a pass reads at least ``density``, and what it reads."""
    least, most = 1, shape.context // shape.page_size
    while least < most:  # what is read grows with the budget
        middle = (least + most) // 2
        tried = with_budget(policy, middle * shape.page_size)
        if relative_density(tried, backend, layer, **info) >= density:
            most = middle
        else:
            least = middle + 1
    found = with_budget(policy, least * shape.page_size)
    return found, relative_density(found, backend, layer, **info)
