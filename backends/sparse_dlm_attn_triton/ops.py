"""The operators as custom operators of PyTorch, on plain tensors: ``torch.ops.sparse_dlm_attn_triton.*``.

Each is opaque to `torch.compile` and has a fake implementation, which tells shapes without computing.
`TritonBackend` checks arguments and calls these. They have no derivative: they serve inference.

Shapes, as in `sparse_dlm_attn.Backend`: ``q`` is ``(batch, q_heads, tokens, head_dim)``, ``k`` and ``v`` of the
block ``(batch, kv_heads, keys, head_dim)``, pages ``(num_pages, kv_heads, page_size, head_dim)``, page table and
lengths int32 ``(batch, pages)``, bounds ``(batch, kv_heads, pages, head_dim)``, a mask of pages bool ``(batch, 1 or
kv_heads or q_heads, spans, pages)``, active rows bool ``(batch, tokens)``, an LSE float32 ``(batch, q_heads,
tokens)``. A state is ``out``, like ``q``, and its LSE.
"""

from __future__ import annotations

import torch

from sparse_dlm_attn.torch_operators import custom_operator
from sparse_dlm_attn_triton import full_sequence, passes, pooled, scores, select
from sparse_dlm_attn_triton.common import last_contiguous
from sparse_dlm_attn_triton.problem import Part
from sparse_dlm_attn_triton.ranked import ranked_plan

__all__ = [
    "attend",
    "attend_block",
    "attend_pages",
    "attend_ranked",
    "page_bounds",
    "page_scores",
    "pooled_scores",
    "top_pages",
]

Tensor = torch.Tensor
CONTEXT = "Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor page_lengths"
CHOSEN = "Tensor mask, SymInt span, Tensor active"
CACHED = "Tensor? cached_out, Tensor? cached_lse"


def _cached(out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if out is None or lse is None else (last_contiguous(out), last_contiguous(lse))


@custom_operator(
    "sparse_dlm_attn_triton::page_bounds",
    "(Tensor k_pages, Tensor page_table, Tensor page_lengths) -> (Tensor, Tensor)",
)
def page_bounds(k_pages: Tensor, page_table: Tensor, page_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of each page's valid keys (clause BOUNDS-1)."""
    return scores.page_bounds(k_pages, page_table, page_lengths)


@custom_operator("sparse_dlm_attn_triton::page_scores", "(Tensor q, Tensor lower, Tensor upper) -> Tensor")
def page_scores(q: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return the largest q.k that a page's box allows, float32 ``(batch, q_heads, tokens, pages)`` (SCORES-1)."""
    return scores.page_scores(q, lower, upper)


@custom_operator("sparse_dlm_attn_triton::top_pages", "(Tensor scores, Tensor count, Tensor eligible) -> Tensor")
def top_pages(scores: Tensor, count: Tensor, eligible: Tensor) -> Tensor:
    """Return the mask of the ``count`` best eligible pages (clause TOP-1), at most `select.MOST_RANKED` pages.

    Integers ``count`` broadcast to ``scores.shape[:-1]``, and bool ``eligible`` to ``scores.shape``.
    """
    return select.top_pages(scores, count, eligible)


@custom_operator(
    "sparse_dlm_attn_triton::pooled_scores",
    "(Tensor q, Tensor k_pages, Tensor page_table, Tensor page_lengths, SymInt span, float scale, "
    "Tensor? lse=None) -> Tensor",
)
def pooled_scores(
    q: Tensor,
    k_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    span: int,
    scale: float,
    lse: Tensor | None = None,
) -> Tensor:
    """Return the mean softmax mass of each page over each span's rows (clause POOLED-1)."""
    return pooled.pooled_scores(q, k_pages, page_table, page_lengths, span, scale, lse)


@custom_operator(
    "sparse_dlm_attn_triton::attend_pages",
    f"(Tensor q, {CONTEXT}, {CHOSEN}, float scale, bool ragged=False) -> (Tensor, Tensor)",
)
def attend_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    mask: Tensor,
    span: int,
    active: Tensor,
    scale: float,
    ragged: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend to selected pages (clause ATTEND-1); return a state."""
    if q.shape[2] > passes.MOST_ROWS:
        return full_sequence.attend_spans(q, k_pages, v_pages, page_table, page_lengths, mask, span, active, scale)
    part = Part(k_pages, v_pages, page_table, page_lengths, mask, span, active, q.shape[2])
    return passes.attend(q, None, part, None, scale, ragged=ragged)[1:3]


@custom_operator(
    "sparse_dlm_attn_triton::attend_block", "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)"
)
def attend_block(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend within the block (clause BLOCK-1); return a state."""
    return passes.attend(q, (k, v), None, None, scale)[1:3]


@custom_operator(
    "sparse_dlm_attn_triton::attend",
    f"(Tensor q, Tensor k, Tensor v, {CONTEXT}, {CHOSEN}, float scale, {CACHED}, "
    "bool ragged=False) -> (Tensor, Tensor, Tensor)",
)
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    mask: Tensor,
    span: int,
    active: Tensor,
    scale: float,
    cached_out: Tensor | None,
    cached_lse: Tensor | None,
    ragged: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a whole pass (clause ATTEND-4); return its output and the state of the context part.

    The cached state is that of inactive rows; None counts as the empty set.
    """
    part = Part(k_pages, v_pages, page_table, page_lengths, mask, span, active, q.shape[2])
    return passes.attend(q, (k, v), part, _cached(cached_out, cached_lse), scale, ragged=ragged)[:3]


@custom_operator(
    "sparse_dlm_attn_triton::attend_ranked",
    f"(Tensor q, Tensor k, Tensor v, {CONTEXT}, Tensor lower, Tensor upper, Tensor? reference, "
    f"SymInt? count, float? mass, SymInt budget, SymInt pages, str union, str keep, float scale, {CACHED}, "
    "bool ragged=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attend_ranked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    lower: Tensor,
    upper: Tensor,
    reference: Tensor | None,
    count: int | None,
    mass: float | None,
    budget: int,
    pages: int,
    union: str,
    keep: str,
    scale: float,
    cached_out: Tensor | None,
    cached_lse: Tensor | None,
    ragged: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decide and run a whole pass by a rule, that of a `sparse_dlm_attn.ranked.RankedPass` (clause RANKED-1).

    Returns the output, the state of the context part, active rows, the mask of pages ``(batch, kv_heads or
    q_heads, 1 or tokens, pages)``, and kept queries (empty if nothing is kept).
    """
    # Copies, if there have to be any, come before the first launch: later kernels read the inputs of a pass
    # before they wait for the kernel in front of them.
    q, k, v, lower, upper = map(last_contiguous, (q, k, v, lower, upper))
    reference = None if reference is None else last_contiguous(reference)
    paged = k_pages, v_pages, page_table.contiguous(), page_lengths.contiguous()
    cached, rule = _cached(cached_out, cached_lse), (count, mass, budget, pages, union, keep)
    plan = ranked_plan(q, k, v, paged, (lower, upper), reference, cached, rule, scale, ragged)
    return plan.run(q, k, v, paged, (lower, upper), reference, cached)


def _state_like(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@page_bounds.register_fake
def _(k_pages: Tensor, page_table: Tensor, page_lengths: Tensor) -> tuple[Tensor, Tensor]:
    (batch, pages), (_, kv_heads, _, head_dim) = page_table.shape, k_pages.shape
    shape = (batch, kv_heads, pages, head_dim)
    return k_pages.new_empty(shape), k_pages.new_empty(shape)


@page_scores.register_fake
def _(q: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:3], lower.shape[2]), dtype=torch.float32)


@top_pages.register_fake
def _(scores: Tensor, count: Tensor, eligible: Tensor) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@pooled_scores.register_fake
def _(
    q: Tensor,
    k_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    span: int,
    scale: float,
    lse: Tensor | None = None,
) -> Tensor:
    spans = (q.shape[2] + span - 1) // span
    return q.new_empty((q.shape[0], q.shape[1], spans, page_table.shape[1]), dtype=torch.float32)


@attend_pages.register_fake
@attend_block.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _state_like(q)


@attend.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return (q.new_empty(q.shape), *_state_like(q))


@attend_ranked.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    lower: Tensor,
    upper: Tensor,
    reference: Tensor | None,
    count: int | None,
    mass: float | None,
    budget: int,
    pages: int,
    union: str,
    keep: str,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, q_heads, tokens, _), width = q.shape, page_table.shape[1]
    heads, spans = (lower.shape[1] if union == "kv_head" else q_heads), (tokens if union == "row" else 1)
    return (
        q.new_empty(q.shape),
        *_state_like(q),
        q.new_empty((batch, tokens), dtype=torch.bool),
        q.new_empty((batch, heads, spans, width), dtype=torch.bool),
        q.new_empty(0 if keep == "nothing" else q.shape),
    )
