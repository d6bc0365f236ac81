"""Small random problems for the core's own tests (the conformance suite has its own strategies)."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_dlm_attn import Context, Selection

Array = np.ndarray[Any, Any]


def ragged_context(
    seed: int, *, batch: int = 2, kv_heads: int = 2, page_size: int = 4, head_dim: int = 8, pages: int = 6,
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


def block(seed: int, *, batch: int = 2, q_heads: int = 4, kv_heads: int = 2, tokens: int = 5,
          head_dim: int = 8, dtype: str = "float32") -> tuple[Array, Array, Array]:
    """Queries, keys and values of one block."""
    rng = np.random.default_rng(seed)
    return tuple(  # type: ignore[return-value]
        rng.standard_normal((batch, heads, tokens, head_dim)).astype(dtype) for heads in (q_heads, kv_heads, kv_heads)
    )


def random_selection(seed: int, context: Context, heads: int, tokens: int, span: int) -> Selection:
    """Each page with probability one half."""
    rng = np.random.default_rng(seed)
    spans = -(-tokens // span)
    return Selection(rng.random((context.batch, heads, spans, context.pages)) < 0.5, span)


def masked_softmax(
    q: Array, context: Context, selection: Selection, active: Array, scale: float
) -> tuple[Array, Array]:
    """Token by token, one masked softmax over a dense copy of the context: the first oracle."""
    batch, q_heads, tokens, _ = q.shape
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, h, row in np.ndindex(batch, q_heads, tokens):
        if not active[b, row]:
            continue
        scores, values = [], []
        for page in range(context.pages):
            if not selection.mask[b, h * selection.heads // q_heads, row // selection.span, page]:
                continue
            for slot in range(context.page_lengths[b, page]):
                where = (context.page_table[b, page], h * context.kv_heads // q_heads, slot)
                key = context.k_pages[where].astype(float)
                scores.append(scale * float(q[b, h, row].astype(float) @ key))
                values.append(context.v_pages[where].astype(float))
        if scores:
            lse[b, h, row] = np.logaddexp.reduce(scores)
            out[b, h, row] = np.exp(np.array(scores) - lse[b, h, row]) @ np.array(values)
    return out, lse
