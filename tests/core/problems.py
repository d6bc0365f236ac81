"""Small random problems for the core's own tests (the conformance suite has its own strategies)."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_dlm_attn import Context

Array = np.ndarray[Any, Any]


def ragged_context(
    seed: int,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    page_size: int = 4,
    head_dim: int = 8,
    pages: int = 6,
    dtype: str = "float32",
) -> Context:
    """Pages shuffled in memory, of random lengths; the first of sequence 0 is absent, the last partial."""
    rng = np.random.default_rng(seed)
    physical = batch * pages + 3
    shape = (physical, kv_heads, page_size, head_dim)
    table = rng.permutation(physical)[: batch * pages].reshape(batch, pages).astype(np.int32)
    lengths = rng.integers(0, page_size + 1, (batch, pages)).astype(np.int32)
    lengths[0, 0], lengths[:, -1] = 0, 1
    keys, values = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    return Context(keys, values, table, lengths)


def block(
    seed: int,
    *,
    batch: int = 2,
    q_heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 5,
    head_dim: int = 8,
    dtype: str = "float32",
) -> tuple[Array, Array, Array]:
    """Queries, keys and values of one block."""
    rng = np.random.default_rng(seed)
    return tuple(  # type: ignore[return-value]
        rng.standard_normal((batch, heads, tokens, head_dim)).astype(dtype) for heads in (q_heads, kv_heads, kv_heads)
    )
