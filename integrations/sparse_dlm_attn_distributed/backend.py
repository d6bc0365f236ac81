"""A backend over many devices: each computes on the pages that it holds, all come to one result."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist

from sparse_dlm_attn import (
    AttentionState,
    Backend,
    Capabilities,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PageBounds,
    Problem,
    RankedPass,
    RankedResult,
    Selection,
    get_backend,
)
from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn.checks import (
    check_attend_block,
    check_attend_pages,
    check_cached,
    check_page_scores,
    check_pooled_scores,
    check_query_change,
    check_top_pages,
)
from sparse_dlm_attn.ranked import check_ranked_pass
from sparse_dlm_attn.values import check_int, softmax_scale
from sparse_dlm_attn_distributed import ranked, ranking
from sparse_dlm_attn_distributed.context import ShardedBounds, ShardedContext
from sparse_dlm_attn_distributed.exchange import Way
from sparse_dlm_attn_distributed.launches import Block
from sparse_dlm_attn_distributed.mesh import join

__all__ = ["DistributedBackend"]


class DistributedBackend(Backend):
    """The operators over a context whose pages are spread over the ranks of a mesh.

    Every rank calls the same operators with the same block; each brings the `ShardedContext` of its own
    pages. Decisions and outputs come out alike on every rank. What goes over the network does not grow
    with the context, but for the candidates of `top_pages`:

    ====================  ===================================================================
    `attend_pages`,       one gather of the states of the ranks: ``out`` in the dtype of the
    `attend`              block and ``lse`` in float32, whatever the context
    `top_pages`           one gather of 8 bytes a row and candidate; or, where that is less,
                          one maximum over 4 bytes a row and page
    `pooled_scores`       nothing where ``lse`` is given, else one gather as of `attend_pages`
    `complete_scores`     one maximum over 4 bytes a row and page
    `query_change`        4 bytes a row, over the ranks of other heads only
    ====================  ===================================================================

    The block itself is on every rank and counted once, after the states of the context are merged.

    Parameters
    ----------
    backend : str or Backend
        Computes on each rank: any backend of PyTorch tensors.
    mesh : torch.distributed.device_mesh.DeviceMesh
        One dimension: pages are spread over its ranks. Two dimensions: pages over the one named
        "context", KV heads (and their query heads) over the other one, in the way of tensor parallelism.
    context_dim, heads_dim : str, optional
        Names of these dimensions, if they are others.
    candidates : int, optional
        Most pages that a row may choose, so that the size of the exchange is known without asking the
        device. Default: read from the counts, which makes the host wait once a ranking on a GPU and
        cannot be captured in a CUDA graph. A row that wants more is an error.
    timeout : float
        Seconds to wait for another rank before `RankError` is raised.
    check : bool, optional
        Compare operator and shapes over the ranks before each exchange, at the price of another small
        one, for which the host waits. Default: where tensors lie in host memory.
    exchange : {"auto", "collective", "symmetric"}
        What ranks exchange through: collectives of `torch.distributed`, or symmetric memory of the GPUs of
        one host, in which kernels write to each other. "auto" takes symmetric memory where all ranks can,
        and `exchange` tells what it took.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If the mesh does not serve, or ranks ask for different things.
    UnavailableError
        If `torch.distributed` is not set up, or ``exchange="symmetric"`` and some rank cannot.
    RankError
        If a rank does not come.
    """

    name: ClassVar[str] = "distributed"

    def __init__(
        self, backend: str | Backend, mesh: Any, *, context_dim: str | None = None,
        heads_dim: str | None = None, candidates: int | None = None, timeout: float = 60.0,
        check: bool | None = None, exchange: Way = "auto",
    ) -> None:
        self.backend = get_backend(backend)
        if isinstance(self.backend, DistributedBackend):
            raise InvalidTypeError("backend", "must compute on one device", "another DistributedBackend")
        if not isinstance(self.backend.asarray([0.0], dtype="float32"), torch.Tensor):
            raise InvalidTypeError(
                "backend", "must compute on tensors of PyTorch", repr(self.backend.name),
                "Pass 'torch', or 'triton' on GPUs.",
            )
        self.candidates = None if candidates is None else check_int("candidates", candidates, 1)
        self.ranks = join(
            mesh, self.backend, context_dim=context_dim, heads_dim=heads_dim, timeout=timeout, check=check,
            way=exchange, told=f"candidates={candidates}, check={check}, exchange={exchange}",
        )
        self.mesh = mesh

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.mesh.shape))
        return (
            f"DistributedBackend({self.backend!r}, {shape} ranks, candidates={self.candidates}, "
            f"exchange={self.exchange!r})"
        )

    @property
    def exchange(self) -> str:
        """What states and candidates go through: "collective" or "symmetric"."""
        return self.ranks.pages.way

    @property
    def why_collective(self) -> list[str]:
        """Why ``exchange="auto"`` did not take symmetric memory; empty if it did, or did not try."""
        return list(self.ranks.pages.why_collective)

    @property
    def capabilities(self) -> Capabilities:
        """Those of the backend on each rank."""
        own = self.backend.capabilities
        return replace(own, notes=f"over {self.mesh.size()} ranks, {self.exchange} exchange; {own.notes}")

    def why_not(self, problem: Problem) -> list[str]:
        """Return every reason of the backend on each rank."""
        return self.backend.why_not(problem)

    def asarray(self, values: Any, *, dtype: str | None = None) -> torch.Tensor:
        """Convert host values to tensors of the backend on this rank."""
        tensor: torch.Tensor = self.backend.asarray(values, dtype=dtype)
        return tensor

    def synchronize(self) -> None:
        """Wait for all work that was given to this rank's GPU, or raise `RankError` in time.

        A kernel that waits for another rank would otherwise wait for ever, and the host with it as soon
        as it looks at a result. On the CPU every operator has done this already.
        """
        if not self.ranks.pages.on_host:
            self.ranks.watch.check()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self.ranks.watch.wait_for_device(event.query)

    def page_bounds(self, context: Context) -> PageBounds:
        here = self._sharded(context)
        bounds = self.backend.page_bounds(here.local)
        return ShardedBounds(bounds.lower, bounds.upper, here.held)

    def extend_bounds(self, context: Context, bounds: PageBounds, from_page: int) -> PageBounds:
        grown = super().extend_bounds(context, bounds, from_page)
        return ShardedBounds(grown.lower, grown.upper, self._sharded(context).held)

    def page_scores(
        self, q: torch.Tensor, bounds: PageBounds, *, active: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return scores of the pages held, -inf for all others: `top_pages` ranks them together."""
        check_page_scores(q, bounds, active)
        scores: torch.Tensor = self.backend.page_scores(q, bounds, active=active)
        if isinstance(bounds, ShardedBounds):
            return torch.where(bounds.held[:, None, None, :], scores, -math.inf)
        if self.ranks.pages.size == 1:
            return scores
        raise InvalidTypeError(
            "bounds", "must be ShardedBounds", type(bounds).__name__,
            "Make them with page_bounds(context) of this backend.",
        )

    def pooled_scores(
        self, q: torch.Tensor, context: Context, *, span: int, scale: float | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return masses of the pages held, 0 for all others: `top_pages` ranks them together."""
        check_pooled_scores(q, context, span, scale, lse)
        here = self._sharded(context)
        if lse is None and self.ranks.pages.size > 1:
            rows = torch.ones((q.shape[0], q.shape[2]), dtype=torch.bool, device=q.device)
            everything = Selection.all_pages(here, q.shape[2])
            lse = self.attend_pages(q, here, everything, rows, scale=scale).lse
        masses: torch.Tensor = self.backend.pooled_scores(q, here.local, span=span, scale=scale, lse=lse)
        return masses

    def top_pages(
        self, scores: torch.Tensor, count: int | torch.Tensor, *, eligible: torch.Tensor
    ) -> torch.Tensor:
        """Return the mask of the best pages of all ranks, the same on each of them."""
        check_top_pages(scores, count, eligible)
        if self.ranks.pages.size == 1:
            alone: torch.Tensor = self.backend.top_pages(scores, count, eligible=eligible)
            return alone
        most = ranking.most_wanted(
            count, eligible, scores.shape[-1], self.candidates, self.ranks.watch.read
        )
        return ranking.top_pages_of_all(self.backend, self.ranks.pages, scores, count, eligible, most)

    def complete_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Return every page's score on every rank."""
        if self.ranks.pages.size == 1:
            return scores
        return ranking.largest_on_any_rank(scores, self.ranks.pages, "complete_scores")

    def query_change(self, q: torch.Tensor, q_reference: torch.Tensor) -> torch.Tensor:
        """Return the mean over the heads of all ranks."""
        heads = self.ranks.heads
        if heads is None or heads.size == 1:
            change: torch.Tensor = self.backend.query_change(q, q_reference)
            return change
        check_query_change(q, q_reference)
        # Sums, not means, so that nothing is rounded before all heads have been added.
        difference = q.to(compute_dtype(q)) - q_reference.to(compute_dtype(q))
        total = heads.reduce(difference.square().sum((1, 3)), dist.ReduceOp.SUM, "query_change")
        return (total / (heads.size * q.shape[1] * q.shape[3])).to(torch.float32)

    def largest_changes(
        self, change: torch.Tensor, *, count: int | None = None, mass: float | None = None
    ) -> torch.Tensor:
        rows: torch.Tensor = self.backend.largest_changes(change, count=count, mass=mass)
        return rows

    def attend_pages(
        self, q: torch.Tensor, context: Context, selection: Selection, active: torch.Tensor, *,
        scale: float | None = None,
    ) -> AttentionState:
        check_attend_pages(q, context, selection, active, scale)
        here = self._sharded(context)
        part = self.backend.attend_pages(q, here.local, selection, active, scale=scale)
        if self.ranks.pages.size == 1:
            return part
        return self.ranks.pages.merge(self.backend, part, "attend_pages")[1]

    def attend_block(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
    ) -> AttentionState:
        return self.backend.attend_block(q, k, v, scale=scale)

    def merge(self, *states: AttentionState) -> AttentionState:
        return self.backend.merge(*states)

    def reuse(
        self, active: torch.Tensor, fresh: AttentionState, cached: AttentionState
    ) -> AttentionState:
        return self.backend.reuse(active, fresh, cached)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context, selection: Selection,
        active: torch.Tensor, cached: AttentionState | None, *, scale: float | None = None,
    ) -> tuple[torch.Tensor, AttentionState]:
        here = self._sharded(context)
        if self.ranks.pages.size == 1:
            return self.backend.attend(q, k, v, here.local, selection, active, cached, scale=scale)
        check_attend_pages(q, context, selection, active, scale)
        check_attend_block(q, k, v, scale)
        if cached is not None:
            check_cached(cached, q)
        part = self.backend.attend_pages(q, here.local, selection, active, scale=scale)
        out, state = self.ranks.pages.merge(
            self.backend, part, "attend", active=active, cached=cached,
            block=Block(q, k, v, softmax_scale(q.shape[3], scale)),
        )
        return cast("torch.Tensor", out), state

    def attend_ranked(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context, bounds: PageBounds,
        ranked_pass: RankedPass, cached: AttentionState | None, *, scale: float | None = None,
    ) -> RankedResult:
        """Decide and run a whole pass by a rule: few launches where mailboxes carry the candidates."""
        here, pages, rule = self._sharded(context), self.ranks.pages, ranked_pass
        if pages.size == 1:
            return self.backend.attend_ranked(q, k, v, here.local, bounds, rule, cached, scale=scale)
        others = self.ranks.heads is not None and self.ranks.heads.size > 1 and rule.reference is not None
        boxes = pages.mailboxes
        if boxes is None or others or not isinstance(bounds, ShardedBounds):
            return super().attend_ranked(q, k, v, context, bounds, rule, cached, scale=scale)
        check_ranked_pass(q, k, v, context, bounds, rule, cached, scale)
        if not ranked.serves(q, here, rule):
            return super().attend_ranked(q, k, v, context, bounds, rule, cached, scale=scale)
        pages.announce("top_pages", q, ranked.message_of(q, here, rule)[0])
        active, mask = ranked.decide(boxes, self.backend, q, here, bounds, rule)
        selection = Selection(mask, 1 if rule.union == "row" else q.shape[2])
        out, state = self.attend(q, k, v, context, selection, active, cached, scale=scale)
        kept = None
        if rule.keep == "queries" or (rule.keep == "active_queries" and rule.reference is None):
            kept = q.clone()
        elif rule.keep == "active_queries" and rule.reference is not None:
            kept = torch.where(active[:, None, :, None], q, rule.reference)
        return RankedResult(out, state, active, selection, kept)

    def _sharded(self, context: Context) -> ShardedContext:
        """Return the context as shards; one rank holds all of any context."""
        if isinstance(context, ShardedContext):
            return context
        if not isinstance(context, Context):
            raise InvalidTypeError("context", "must be a ShardedContext", type(context).__name__)
        if self.ranks.pages.size > 1:
            raise InvalidArgumentError(
                "context", "must be a ShardedContext, which says the pages that this rank holds",
                type(context).__name__,
                "Make one with ShardedContext(..., held=...); pages held by every rank would count as often.",
            )
        return ShardedContext(
            context.k_pages, context.v_pages, context.page_table, context.page_lengths,
            context.page_segments, None, context.version, held=torch.ones_like(context.exists),
        )
