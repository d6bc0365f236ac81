"""Whole passes: the launches of attention, settled once for all passes whose tensors have one form."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sparse_dlm_attn_triton import settings
from sparse_dlm_attn_triton.attention import SplitKV, split_kv
from sparse_dlm_attn_triton.common import Launch, last_contiguous
from sparse_dlm_attn_triton.finish import finish_launch
from sparse_dlm_attn_triton.problem import Part, Sizes, grid_of, sizes_of
from sparse_dlm_attn_triton.stream_k import MOST_PAIRS, StreamK, stream_k

__all__ = ["MOST_ROWS", "Plan", "attend", "planned"]

MOST_ROWS = 128
"""Longest block that the kernels of a pass take; longer ones are whole sequences (`full_sequence`)."""
Tensor = torch.Tensor


@dataclass(frozen=True)
class Plan:
    """The launches of a pass: partial states, then their merge into what the pass returns.

    ``whole`` says whether context and block are merged into an output, ``keeps`` whether queries are stored.
    """

    parts: SplitKV | StreamK
    finish: Launch
    whole: bool
    keeps: bool

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        part: Part,
        cached: tuple[Tensor, Tensor] | None,
        reference: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Launch a pass; return its output, ``out`` and ``lse`` of the part that is kept, and the kept queries."""
        state_out = torch.empty_like(q, memory_format=torch.contiguous_format)
        state_lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        out = torch.empty_like(state_out) if self.whole else q.new_empty(0)
        kept = torch.empty_like(state_out) if self.keeps else q.new_empty(0)
        parts = self.parts.run(q, k, v, part)
        old, old_lse = (q, state_lse) if cached is None else cached
        before = q if reference is None else reference
        self.finish(q, part.active, *parts, old, old_lse, before, out, state_out, state_lse, kept)
        return out, state_out, state_lse, kept


@functools.lru_cache(maxsize=1024)
def planned(sizes: Sizes, epoch: int) -> Plan:
    """Settle the launches of a pass; ``epoch`` counts changes of the settings."""
    grid, whole, keeps = grid_of(sizes), sizes.has_context and sizes.k is not None, sizes.keep > 0
    ragged = sizes.has_pages and sizes.ragged and sizes.q[0][0] > 1
    if ragged and grid.tiles == 1 and grid.pairs <= MOST_PAIRS:
        streamed = stream_k(sizes, grid)
        return Plan(streamed, finish_launch(sizes, 0, 0, streamed.block_slots), whole, keeps)
    split = split_kv(sizes, grid)
    return Plan(split, finish_launch(sizes, split.splits, split.slots), whole, keeps)


def attend(
    q: Tensor,
    block: tuple[Tensor, Tensor] | None,
    part: Part | None,
    cached: tuple[Tensor, Tensor] | None,
    scale: float,
    keep: int = 0,
    reference: Tensor | None = None,
    *,
    later: bool = False,
    ragged: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch a pass, or the half of it that is asked for: ``block`` is its k and v, ``part`` the context part.

    ``cached`` is the state of inactive rows; None counts as the empty set. ``keep`` says what to store for the next
    pass to measure change against: nothing (0), all queries (1), those of active rows and ``reference`` elsewhere
    (2). ``later`` says that kernels of the same pass were launched before.

    Returns the output of the pass, ``out`` and ``lse`` of the context part (of the block if there is no context
    part), and the kept queries. Empty tensors stand for what was not asked for.
    """
    # Copies, if there have to be any, come before the first launch: later kernels read the inputs of a pass
    # before they wait for the kernel in front of them.
    q = last_contiguous(q)
    if q.numel() == 0:
        no_lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        return torch.empty_like(q), torch.empty_like(q), no_lse, torch.empty_like(q)
    cached = None if cached is None else (last_contiguous(cached[0]), last_contiguous(cached[1]))
    reference = None if reference is None else last_contiguous(reference)
    k, v = (q, q) if block is None else (last_contiguous(block[0]), last_contiguous(block[1]))
    part = None if part is None else part.contiguous()
    both = None if block is None else (k, v)
    sizes = sizes_of(q, both, part, cached, reference, scale, keep, later, ragged)
    part = _no_part(q) if part is None else part
    return planned(sizes, settings.epoch()).run(q, k, v, part, cached, reference)


@functools.cache
def _unread(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(1, dtype=torch.int32, device=device), torch.empty(1, dtype=torch.bool, device=device)


def _no_part(q: Tensor) -> Part:
    """Return tensors to launch with where no context part is asked for; none of them is read."""
    table, mask = _unread(q.device)
    return Part(q, q, table, table, mask, 1, mask, q.shape[2])
