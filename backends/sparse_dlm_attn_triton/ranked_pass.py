"""A ranked pass: its decisions and its attention, settled once for all passes whose tensors have one form."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from sparse_dlm_attn_triton import launch, settings
from sparse_dlm_attn_triton.common import aligned, layout
from sparse_dlm_attn_triton.launch_decisions import Ranking, ranking_of

__all__ = ["RankedPlan", "ranked_plan"]

Tensor = torch.Tensor
Pages = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys and values of the pool, page table and page lengths."""
KEEP = {"nothing": 0, "queries": 1, "active_queries": 2}


@dataclass(frozen=True)
class RankedPlan:
    """The launches of a ranked pass."""

    ranking: Ranking
    attending: launch.Plan
    span: int

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Pages, bounds: tuple[Tensor, Tensor],
        reference: Tensor | None, cached: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Launch it; return what `ops.attend_ranked` returns."""
        active, mask = self.ranking.run(q, bounds, pages[3], reference)
        part = launch.Part(*pages, mask, self.span, active, 0)
        out, state_out, state_lse, kept = self.attending.run(q, k, v, part, cached, reference)
        return out, state_out, state_lse, active, mask, kept


def ranked_plan(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, bounds: tuple[Tensor, Tensor],
    reference: Tensor | None, cached: tuple[Tensor, Tensor] | None, rule: tuple[Any, ...], scale: float, ragged: bool,
) -> RankedPlan:  # fmt: skip
    """Return the plan for tensors as kernels read them, `lined`.

    Parameters
    ----------
    q, k, v, pages, bounds, reference, cached
        As for `RankedPlan.run`.
    rule : tuple
        ``count, mass, budget, pages, union, keep`` of a `sparse_dlm_attn.ranked.RankedPass`.
    scale : float
        Factor on q.k.
    ragged : bool
        Whether programs take equal shares of all lists together.
    """
    count, _, _, _, union, keep = rule
    tokens = q.shape[2]
    most = tokens if reference is None or count is None else min(count, tokens)
    kept = KEEP["queries" if keep == "active_queries" and reference is None else keep]
    part = launch.Part(*pages, q, 1 if union == "row" else max(tokens, 1), q, most)
    sizes = launch.sizes_of(q, (k, v), part, cached, reference, scale, kept, True, ragged, mask=())
    whole = sizes._replace(straight=sizes.straight and aligned(*bounds))
    return _settled(whole, layout(bounds[0]), layout(bounds[1]), None if reference is None else reference.shape, rule,
                    settings.epoch())  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _settled(
    sizes: launch.Sizes, lower: Any, upper: Any, reference: Any, rule: tuple[Any, ...], epoch: int
) -> RankedPlan:
    count, mass, budget, pages, union, _ = rule
    before = None if reference is None else (reference, sizes.reference)
    ranking = ranking_of(
        sizes.device, sizes.dtype, sizes.q, (lower, upper), before, count, mass, budget, pages, union, sizes.straight
    )
    strides = [1]
    for size in ranking.mask[:0:-1]:
        strides.insert(0, strides[0] * size)
    plan = launch.planned(sizes._replace(mask=(ranking.mask, tuple(strides))), epoch)
    return RankedPlan(ranking, plan, sizes.span)
