"""The operators as custom operators of PyTorch, on plain tensors: ``torch.ops.sparse_dlm_attn.*``.

Each is opaque to `torch.compile`, which therefore neither breaks the graph at it nor looks into it, and
has a fake implementation, which tells shapes without computing. `TorchBackend` checks arguments and
calls these. They have no derivative: they serve inference. `torch.autocast` changes nothing in them.
"""

from __future__ import annotations

import torch

from sparse_dlm_attn.arrays import compute_dtype, without_autocast
from sparse_dlm_attn.torch_operators import custom_operator
from sparse_dlm_attn_torch import block_sparse, dense, flex, gather, masked, metadata
from sparse_dlm_attn_torch.states import merged
from sparse_dlm_attn_torch.threads import short_operations

__all__ = ["attend", "attend_block", "attend_pages", "page_bounds", "page_scores", "pooled_scores", "top_pages"]

Pair = tuple[torch.Tensor, torch.Tensor]
CONTEXT = "Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor page_lengths"
CHOSEN = "Tensor mask, SymInt span, Tensor active, float scale, str path"
PATHS = {
    "gather": gather.attend_pages,
    "masked": masked.attend_pages,
    "flex": flex.attend_pages,
    "block-sparse": block_sparse.attend_pages,
}
DENSE = {"matmul": dense.attend_dense, "flash": dense.attend_flash}


@custom_operator("sparse_dlm_attn::attend_pages", f"(Tensor q, {CONTEXT}, {CHOSEN}) -> (Tensor, Tensor)")
@without_autocast
def attend_pages(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    page_lengths: torch.Tensor,
    mask: torch.Tensor,
    span: int,
    active: torch.Tensor,
    scale: float,
    path: str,
) -> Pair:
    """Attend to selected pages (clause ATTEND-1).

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    k_pages, v_pages : torch.Tensor
        ``(num_pages, kv_heads, page_size, head_dim)``.
    page_table, page_lengths : torch.Tensor
        int32 ``(batch, pages)``.
    mask : torch.Tensor
        bool ``(batch, 1 or kv_heads or q_heads, spans, pages)``.
    span : int
        Rows that share a selection.
    active : torch.Tensor
        bool ``(batch, tokens)``.
    scale : float
        Factor on q.k.
    path : str
        "gather", "masked", "flex" or "block-sparse".

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and float32 ``lse`` ``(batch, q_heads, tokens)``.
    """
    return PATHS[path](q, k_pages, v_pages, page_table, page_lengths, mask, span, active, scale)


@custom_operator(
    "sparse_dlm_attn::attend_block", "(Tensor q, Tensor k, Tensor v, float scale, str dense) -> (Tensor, Tensor)"
)
@without_autocast
def attend_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dense: str) -> Pair:
    """Attend within the block (clause BLOCK-1).

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    k, v : torch.Tensor
        ``(batch, kv_heads, keys, head_dim)``.
    scale : float
        Factor on q.k.
    dense : str
        "matmul" or "flash".

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and float32 ``lse`` ``(batch, q_heads, tokens)``.
    """
    return DENSE[dense](q, k, v, scale)


@custom_operator(
    "sparse_dlm_attn::attend",
    f"(Tensor q, Tensor k, Tensor v, {CONTEXT}, {CHOSEN}, str dense, Tensor? cached_out, "
    "Tensor? cached_lse) -> (Tensor, Tensor, Tensor)",
)
@without_autocast
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    page_lengths: torch.Tensor,
    mask: torch.Tensor,
    span: int,
    active: torch.Tensor,
    scale: float,
    path: str,
    dense: str,
    cached_out: torch.Tensor | None,
    cached_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a whole pass (clause ATTEND-4); parameters as those of `attend_pages` and `attend_block`.

    Parameters
    ----------
    q, k, v, k_pages, v_pages, page_table, page_lengths, mask, span, active, scale, path, dense
        See there.
    cached_out, cached_lse : torch.Tensor or None
        Context part of inactive rows; None counts as the empty set.

    Returns
    -------
    tuple of torch.Tensor
        The output, and ``out`` and ``lse`` of the context part.
    """
    pages = PATHS[path](q, k_pages, v_pages, page_table, page_lengths, mask, span, active, scale)
    with short_operations(q):
        if cached_out is not None and cached_lse is not None:
            rows = active[:, None, :]
            pages = (torch.where(rows[..., None], pages[0], cached_out), torch.where(rows, pages[1], cached_lse))
        block = DENSE[dense](q, k, v, scale)
        dtype = compute_dtype(q)
        outs, lses = ([state[side].to(dtype) for state in (pages, block)] for side in (0, 1))
        out = merged(outs, lses)[0].to(q.dtype).contiguous()
        return out, pages[0].contiguous(), pages[1].contiguous()


@custom_operator(
    "sparse_dlm_attn::page_bounds", "(Tensor k_pages, Tensor page_table, Tensor page_lengths) -> (Tensor, Tensor)"
)
def page_bounds(k_pages: torch.Tensor, page_table: torch.Tensor, page_lengths: torch.Tensor) -> Pair:
    """Return minimum and maximum of each page's valid keys (clause BOUNDS-1).

    Parameters
    ----------
    k_pages, page_table, page_lengths : torch.Tensor
        As for `attend_pages`.

    Returns
    -------
    tuple of torch.Tensor
        ``(batch, kv_heads, pages, head_dim)`` each.
    """
    return metadata.page_bounds(k_pages, page_table, page_lengths)


@custom_operator(
    "sparse_dlm_attn::page_scores", "(Tensor q, Tensor lower, Tensor upper, Tensor? active=None) -> Tensor"
)
@without_autocast
def page_scores(
    q: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, active: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the largest q.k that a page's box allows (clause SCORES-1).

    Parameters
    ----------
    q : torch.Tensor
        As for `attend_pages`.
    lower, upper : torch.Tensor
        As from `page_bounds`.
    active : torch.Tensor or None
        As for `attend_pages`; rows outside it may hold anything.

    Returns
    -------
    torch.Tensor
        float32 ``(batch, q_heads, tokens, pages)``.
    """
    return metadata.page_scores(q, lower, upper, active)


@custom_operator("sparse_dlm_attn::top_pages", "(Tensor scores, Tensor count, Tensor eligible) -> Tensor")
def top_pages(scores: torch.Tensor, count: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """Return the mask of the ``count`` best eligible pages (clause TOP-1).

    Parameters
    ----------
    scores : torch.Tensor
        ``(..., pages)``.
    count : torch.Tensor
        Integers that broadcast to ``(...)``.
    eligible : torch.Tensor
        bool, broadcasts to the shape of ``scores``.

    Returns
    -------
    torch.Tensor
        bool, like ``scores``.
    """
    return metadata.top_pages(scores, count, eligible).contiguous()


@custom_operator(
    "sparse_dlm_attn::pooled_scores",
    "(Tensor q, Tensor k_pages, Tensor page_table, Tensor page_lengths, SymInt span, float scale, "
    "Tensor? lse=None) -> Tensor",
)
@without_autocast
def pooled_scores(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    page_lengths: torch.Tensor,
    span: int,
    scale: float,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean softmax mass of each page over each span's rows (clause POOLED-1).

    Parameters
    ----------
    q, k_pages, page_table, page_lengths, span, scale
        As for `attend_pages`.
    lse : torch.Tensor or None
        float32 ``(batch, q_heads, tokens)``: what masses are shares of; None for the context's own.

    Returns
    -------
    torch.Tensor
        float32 ``(batch, q_heads, spans, pages)``.
    """
    return metadata.pooled_scores(q, k_pages, page_table, page_lengths, span, scale, lse)


def _state_like(q: torch.Tensor) -> Pair:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@attend_pages.register_fake
def _(q: torch.Tensor, *others: object) -> Pair:
    return _state_like(q)


@attend_block.register_fake
def _(q: torch.Tensor, *others: object) -> Pair:
    return _state_like(q)


@attend.register_fake
def _(q: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (q.new_empty(q.shape), *_state_like(q))


@page_bounds.register_fake
def _(k_pages: torch.Tensor, page_table: torch.Tensor, page_lengths: torch.Tensor) -> Pair:
    (batch, pages), (_, kv_heads, _, head_dim) = page_table.shape, k_pages.shape
    shape = (batch, kv_heads, pages, head_dim)
    return k_pages.new_empty(shape), k_pages.new_empty(shape)


@page_scores.register_fake
def _(q: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], lower.shape[2]), dtype=torch.float32)


@top_pages.register_fake
def _(scores: torch.Tensor, count: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@pooled_scores.register_fake
def _(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    page_lengths: torch.Tensor,
    span: int,
    scale: float,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    spans = (q.shape[2] + span - 1) // span
    return q.new_empty((q.shape[0], q.shape[1], spans, page_table.shape[1]), dtype=torch.float32)
