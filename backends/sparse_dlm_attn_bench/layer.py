"""One layer of a block-wise DLM over a long paged context: the problem that is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_dlm_attn import Backend, Context, InvalidArgumentError, PassInfo, PrefixAttention, get_policy
from sparse_dlm_attn.registry import _split_parameters
from sparse_dlm_attn_bench.timing import COLD_BYTES

__all__ = ["Layer", "Shape", "budget_for", "layers", "relative_density", "runner", "with_budget"]

MOST_BYTES = 24 << 30
"""Device memory to take for caches at the most, and half of what is free."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem.

    Parameters
    ----------
    batch, tokens, q_heads, kv_heads, head_dim, page_size : int
        Sequences, rows of a block, heads, channels, tokens a page.
    context : int
        Context tokens, a multiple of ``page_size``.
    dtype : str
        "bfloat16", "float16" or "float32".

    Raises
    ------
    InvalidArgumentError
        If a size is below 1, or sizes do not fit each other.
    """

    batch: int = 1
    context: int = 65536
    tokens: int = 16
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("batch", "context", "tokens", "q_heads", "kv_heads", "head_dim", "page_size"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(name, "must be at least 1", getattr(self, name))
        if self.q_heads % self.kv_heads:
            raise InvalidArgumentError(
                "q_heads", f"must be a multiple of kv_heads={self.kv_heads}", self.q_heads
            )
        if self.context % self.page_size:
            raise InvalidArgumentError(
                "context", f"must be a multiple of page_size={self.page_size} tokens", self.context
            )
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise InvalidArgumentError("dtype", "must be bfloat16, float16 or float32", repr(self.dtype))

    @property
    def element_bytes(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def cache_bytes(self) -> int:
        """Bytes of the context's keys and values."""
        return 2 * self.batch * self.kv_heads * self.context * self.head_dim * self.element_bytes

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the bounds of all pages."""
        return self.cache_bytes // self.page_size

    def __str__(self) -> str:
        return f"B{self.batch} {self.context // 1024}K T{self.tokens} p{self.page_size}"


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
    shuffled : bool
        Whether pages lie in random order behind a page table, instead of in a dense cache.
    share : float
        What the sparsest pass reads of the context.

    Returns
    -------
    list of Layer
        At least two.

    Raises
    ------
    InvalidArgumentError
        If two of them do not fit the GPU's free memory.
    """
    room = min(MOST_BYTES, torch.cuda.mem_get_info()[0] // 2)
    if 2 * shape.cache_bytes > room:
        raise InvalidArgumentError(
            "context", f"must fit two layers' caches into {room >> 20} MiB, half of the GPU's free memory",
            f"{shape.cache_bytes >> 20} MiB each for {shape}", "Shorten it, or use fewer sequences.",
        )
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

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
        moved = torch.linspace(0.05, 0.5, shape.tokens, device="cuda")[:, None]
        k, v = (normal(shape.batch, shape.kv_heads, shape.tokens, shape.head_dim) for _ in range(2))
        made.append(Layer(q, (q + moved * normal(*q.shape)).to(dtype), k, v, cache, context))
    return made


def _shuffled(
    context: Context, shape: Shape, cache: tuple[torch.Tensor, ...], generator: torch.Generator
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


def runner(
    policy: Any, backend: Backend, layer: Layer, index: int = 2, **info: Any
) -> Callable[[], Any]:
    """Return a function that runs pass ``index`` of a layer again and again, with the memory before it.

    Parameters
    ----------
    policy : str or PrefixAttentionPolicy
        As for `PrefixAttention`.
    backend : Backend
        Computes.
    layer : Layer
        Inputs.
    index : int
        Which pass; those before it run once, now.
    **info
        Further fields of `PassInfo`.
    """
    attention, memory = PrefixAttention(policy, backend), None
    for before in range(index):
        _, memory = attention(layer.q, layer.k, layer.v, layer.context, memory, PassInfo(before, **info))

    def run() -> Any:
        return attention(layer.q_next, layer.k, layer.v, layer.context, memory, PassInfo(index, **info))

    return run


def relative_density(
    policy: Any, backend: Backend, layer: Layer, index: int = 2, **info: Any
) -> float:
    """Return the share of the context that pass ``index`` reads, the mean over sequences."""
    return float(runner(policy, backend, layer, index, **info)()[1].traffic.density.mean())


def with_budget(policy: str, budget: int) -> str:
    """Return a policy's text with its budget.

    Parameters
    ----------
    policy : str
        ``"name"`` or ``"name:key=value,..."``, without a budget.
    budget : int
        Context tokens a row may read.

    Raises
    ------
    InvalidArgumentError
        If it names a budget itself.
    UnknownNameError
        If the policy has no such parameter.
    """
    if "budget" in _split_parameters("policy", policy)[1]:
        raise InvalidArgumentError(
            "policy", "must leave its budget out, which follows from the density", repr(policy)
        )
    written = f"{policy}{',' if '=' in policy else ':'}budget={budget}"
    get_policy(written)
    return written


def budget_for(
    density: float, policy: str, shape: Shape, backend: Backend, layer: Layer, **info: Any
) -> tuple[str, float]:
    """Return the smallest budget with which a pass reads at least ``density``, and what it reads.

    Parameters
    ----------
    density : float
        Share of the context, over 0 and at most 1.
    policy : str
        As for `with_budget`.
    shape : Shape
        Sizes.
    backend : Backend
        Computes.
    layer : Layer
        Inputs.
    **info
        Further fields of `PassInfo`.

    Returns
    -------
    policy : str
        The policy with its budget, whole pages.
    density : float
        What its pass 2 reads; less than asked for where the whole context as budget reads less.
    """
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
