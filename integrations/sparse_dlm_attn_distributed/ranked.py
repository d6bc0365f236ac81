"""The decisions of a ranked pass over many GPUs, in a few launches; see `ranked_kernels`."""

from __future__ import annotations

import functools

import torch

from sparse_dlm_attn import Backend, PageBounds, RankedPass
from sparse_dlm_attn_distributed.context import ShardedContext
from sparse_dlm_attn_distributed.launches import chained, lined, most_programs, power_of_two
from sparse_dlm_attn_distributed.mailbox import Mailbox, Mailboxes

__all__ = ["decide", "serves"]

MOST_PAGES = 16384
"""Most pages that a program ranks in registers."""
MOST_CHOSEN = 64
"""Most pages of a row: a program takes them one after the other."""


def serves(q: torch.Tensor, context: ShardedContext, rule: RankedPass) -> bool:
    """Return whether the kernels take such a pass."""
    if 0 in (context.pages, *q.shape) or q.shape[2] > 128 or q.dtype == torch.float64:
        return False
    return context.pages <= MOST_PAGES and 0 < min(rule.pages, context.pages) <= MOST_CHOSEN


def decide(
    boxes: Mailboxes, backend: Backend, q: torch.Tensor, context: ShardedContext, bounds: PageBounds,
    rule: RankedPass,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return active rows and the union of pages, the same on every rank.

    Parameters
    ----------
    boxes : Mailboxes
        Of the ranks that hold pages.
    backend : Backend
        Scores pages on each rank.
    q, context, bounds, rule
        As for :meth:`sparse_dlm_attn.Backend.attend_ranked`.

    Returns
    -------
    active : torch.Tensor
        bool ``(batch, tokens)``.
    mask : torch.Tensor
        bool ``(batch, kv_heads or q_heads, 1 or tokens, pages)``.
    """
    scores = backend.page_scores(q, bounds)
    changes = scores if rule.reference is None else change_of(q, rule.reference)
    box = boxes.box(*message_of(q, context, rule))
    return choose(boxes, box, scores, changes, context, rule, q.shape[1])


def change_of(q: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return how far each row's query moved, float32 ``(batch, tokens)`` (CHANGE-1)."""
    from sparse_dlm_attn_distributed.ranked_kernels import change_kernel

    q, reference = lined(q), lined(reference)
    batch, q_heads, tokens, head_dim = q.shape
    changes = torch.empty((batch, tokens), dtype=torch.float32, device=q.device)
    change_kernel[(tokens, batch)](
        q, reference, changes, q_heads, *q.stride()[:3], *reference.stride()[:3],
        HEAD_DIM=head_dim, NUMBERS=q_heads * head_dim, BLOCK_H=min(power_of_two(q_heads), 32),
        BLOCK_D=power_of_two(head_dim), num_warps=4, **chained(q.device),
    )  # fmt: skip
    return changes


def message_of(q: torch.Tensor, context: ShardedContext, rule: RankedPass) -> tuple[int, int]:
    """Return the bytes of a rank's candidates, and how many programs share them."""
    items = q.shape[0] * q.shape[1] * most_active(q.shape[2], rule)
    programs = most_programs(q.device, 4 if context.pages <= 4096 else 1)
    return items * power_of_two(min(rule.pages, context.pages)) * 8, min(items, programs)


def most_active(tokens: int, rule: RankedPass) -> int:
    """Return the bound of the active rows of a sequence that is known on the host."""
    if rule.reference is None or rule.count is None:
        return tokens
    return min(max(rule.count, 1), tokens)


def choose(
    boxes: Mailboxes, box: Mailbox, scores: torch.Tensor, changes: torch.Tensor, context: ShardedContext,
    rule: RankedPass, q_heads: int, phase: int = 3,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exchange candidates and choose; see `decide`. ``scores`` are those of this rank's pages."""
    from sparse_dlm_attn_distributed.ranked_kernels import choose_kernel

    (batch, _, tokens, pages), device = scores.shape, scores.device
    heads = context.kv_heads if rule.union == "kv_head" else q_heads
    spans = tokens if rule.union == "row" else 1
    mask = torch.zeros((batch, heads, spans, pages), dtype=torch.bool, device=device)
    active = torch.empty((batch, tokens), dtype=torch.bool, device=device)
    most, bought = most_active(tokens, rule), min(rule.pages, pages)
    stopped, limit = boxes.words
    choose_kernel[(box.programs,)](
        box.table, box.epochs, stopped, scores, changes, context.page_lengths.contiguous(),
        context.held.contiguous().view(torch.int8), active.view(torch.int8), mask.view(torch.int8),
        q_heads, pages, heads * spans, most, batch * q_heads * most, min(rule.count or 0, tokens),
        _constant(float(rule.mass or 0.0), device), min(rule.budget, pages * context.page_size), bought,
        box.space, box.flags_at, limit,
        TOKENS=tokens, RANK=boxes.rank, RANKS=boxes.ranks, PHASE=phase, BLOCK_T=power_of_two(tokens),
        BLOCK_P=power_of_two(pages), BLOCK_C=power_of_two(bought), BLOCK_R=power_of_two(boxes.ranks),
        BY_MASS=rule.mass is not None, ALL_ROWS=rule.reference is None,
        num_warps=4 if pages <= 4096 else 8, **chained(device),
    )  # fmt: skip
    return active, mask


@functools.lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> torch.Tensor:
    """Return a float64 number on the device: kernels take floats as float32, which would round it."""
    return torch.tensor([value], dtype=torch.float64, device=device)
