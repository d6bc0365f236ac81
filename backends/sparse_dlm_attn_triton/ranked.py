"""Ranked passes: decisions and attention, settled once for all passes whose tensors have one form."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sparse_dlm_attn_triton import passes, settings
from sparse_dlm_attn_triton.common import Launch, aligned, layout
from sparse_dlm_attn_triton.problem import Part, Sizes, sizes_of
from sparse_dlm_attn_triton.scores import changes_launch, scores_launch
from sparse_dlm_attn_triton.select import select_launch

__all__ = ["RankedPlan", "Ranking", "ranked_plan", "ranking_of"]

Tensor = torch.Tensor
Pages = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys and values of the pool, page table and page lengths."""
KEEP = {"nothing": 0, "queries": 1, "active_queries": 2}


class Ranking(NamedTuple):
    """The launches of a ranked pass's decisions, and the shapes of what they write.

    ``mask`` is ``(batch, kv_heads or q_heads, 1 or tokens, pages)``, ``active`` ``(batch, tokens)``.
    """

    mask: tuple[int, ...]
    active: tuple[int, ...]
    order: tuple[int, ...]
    scores: tuple[int, ...]
    mass: Tensor
    changes: Launch | None
    score: Launch
    select: Launch

    def run(
        self, q: Tensor, bounds: tuple[Tensor, Tensor], page_lengths: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Launch scores and changes, then active rows and pages; return rows and pages, bool."""
        device = q.device
        mask = torch.empty(self.mask, dtype=torch.bool, device=device)
        active = torch.empty(self.active, dtype=torch.bool, device=device)
        order = torch.empty(self.order, dtype=torch.int32, device=device)
        scores = torch.empty(self.scores, dtype=torch.float32, device=device)
        changes = order
        if self.changes is not None and reference is not None:
            changes = torch.empty(self.active, dtype=torch.float32, device=device)
            self.changes(q, reference, changes)
        self.score(q, *bounds, changes, self.mass, scores, active, order, mask)
        self.select(scores, order, page_lengths, mask)
        return active, mask


def ranking_of(
    device: torch.device,
    dtype: torch.dtype,
    q: Any,
    bounds: tuple[Any, Any],
    reference: Any,
    count: int | None,
    mass: float | None,
    budget: int,
    top_k: int,
    union: str,
    aligned_all: bool,
) -> Ranking:
    """Settle the launches of a ranked pass's decisions, from the layouts of queries, bounds and reference.

    Without a reference every row is active; with one, ``count`` rows or a share ``mass`` of all change. A context of
    at most ``budget`` tokens is read whole, else ``top_k`` pages of each row and head, united over ``union``.
    """
    (batch, q_heads, tokens, _), (_, kv_heads, pages, _) = q[0], bounds[0][0]
    spans, heads = tokens if union == "row" else 1, kv_heads if union == "kv_head" else q_heads
    rule = "all" if reference is None else "mass" if count is None else "count"
    rows = min(max(count, 1), tokens) if rule == "count" and count is not None else tokens
    unions = heads * spans
    return Ranking(
        (batch, heads, spans, pages),
        (batch, tokens),
        (batch, rows),
        (batch, q_heads, rows, pages),
        _constant(float(mass or 0.0), device),
        None if reference is None else changes_launch(device, q, reference, aligned_all),
        scores_launch(device, dtype, q, *bounds, rows, rule, unions, count or 0, aligned_all),
        select_launch(device, (rows, q_heads, batch), tokens, pages, unions, budget, top_k, aligned_all),
    )


@functools.lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    """Return a float64 number on the device: kernels take floats as float32, which would round it."""
    return torch.tensor([value], dtype=torch.float64, device=device)


@dataclass(frozen=True)
class RankedPlan:
    """The launches of a ranked pass."""

    ranking: Ranking
    attention: passes.Plan
    span: int

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Pages,
        bounds: tuple[Tensor, Tensor],
        reference: Tensor | None,
        cached: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Launch it; return what `ops.attend_ranked` returns."""
        active, mask = self.ranking.run(q, bounds, pages[3], reference)
        part = Part(*pages, mask, self.span, active, 0)
        out, state_out, state_lse, kept = self.attention.run(q, k, v, part, cached, reference)
        return out, state_out, state_lse, active, mask, kept


def ranked_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Pages,
    bounds: tuple[Tensor, Tensor],
    reference: Tensor | None,
    cached: tuple[Tensor, Tensor] | None,
    rule: tuple[Any, ...],
    scale: float,
    ragged: bool,
) -> RankedPlan:
    """Return the plan for tensors whose last axes are contiguous, as kernels read them.

    ``rule`` is ``count, mass, budget, pages, union, keep`` of a `sparse_dlm_attn.ranked.RankedPass`.
    """
    count, _, _, _, union, keep = rule
    tokens = q.shape[2]
    most = tokens if reference is None or count is None else min(count, tokens)
    kept = KEEP["queries" if keep == "active_queries" and reference is None else keep]
    part = Part(*pages, q, 1 if union == "row" else max(tokens, 1), q, most)
    sizes = sizes_of(q, (k, v), part, cached, reference, scale, kept, True, ragged, mask=())
    sizes = sizes._replace(aligned=sizes.aligned and aligned(*bounds))
    before = None if reference is None else reference.shape
    return _planned(sizes, layout(bounds[0]), layout(bounds[1]), before, rule, settings.epoch())


@functools.lru_cache(maxsize=1024)
def _planned(sizes: Sizes, lower: Any, upper: Any, reference: Any, rule: tuple[Any, ...], epoch: int) -> RankedPlan:
    count, mass, budget, pages, union, _ = rule
    before = None if reference is None else (reference, sizes.reference)
    ranking = ranking_of(
        sizes.device, sizes.dtype, sizes.q, (lower, upper), before, count, mass, budget, pages, union, sizes.aligned
    )
    strides = [1]
    for size in ranking.mask[:0:-1]:
        strides.insert(0, strides[0] * size)
    plan = passes.planned(sizes._replace(mask=(ranking.mask, tuple(strides))), epoch)
    return RankedPlan(ranking, plan, sizes.span)
