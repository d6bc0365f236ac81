"""A backend over many devices: each computes on the pages that it holds, all come to one result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist

from sparse_dlm_attn import (
    AttentionState,
    Backend,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PageBounds,
    Selection,
    get_backend,
)
from sparse_dlm_attn.arrays import compute_dtype
from sparse_dlm_attn.capabilities import Capabilities, Problem
from sparse_dlm_attn.checks import check_attend_block, check_cached, check_pooled_scores, check_query_change
from sparse_dlm_attn_distributed.context import ShardedBounds, ShardedContext
from sparse_dlm_attn_distributed.merging import finish, packed
from sparse_dlm_attn_distributed.mesh import agree, dimensions

__all__ = ["DistributedBackend"]

# The new name of a function whose old one warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class DistributedBackend(Backend):
    """The operators over a context whose pages are spread over the ranks of a mesh.

    Every rank calls the same operators with the same block; each brings the `ShardedContext` of its own
    pages. Keys and values stay where they are. Bounds and masses of pages are brought together where they
    are made, so every rank decides about all pages by the operators of one device, and `attend` merges the
    ranks' attention states:

    ====================  ===================================================================
    `attend`,             one all-gather of states: ``out`` in the dtype of the block and
    `attend_pages`        ``lse`` in float32, whatever the context
    `page_bounds`,        one all-reduce of two vectors a page and KV head: once a block, or
    `extend_bounds`       for the pages written to, or never where the owner keeps the bounds
    `pooled_scores`       one all-reduce of 4 bytes a span, query head and page; without
                          ``lse`` an `attend_pages` besides
    `query_change`        one all-reduce of 4 bytes a row, over the ranks of other heads only
    ====================  ===================================================================

    The block itself is on every rank and counted once, after the states of the context are merged.
    Time limits are those of the mesh's process groups.

    Parameters
    ----------
    backend : str or Backend
        Computes on each rank: any backend of PyTorch tensors.
    mesh : torch.distributed.device_mesh.DeviceMesh
        One dimension: pages are spread over its ranks. Two dimensions: pages over the one named
        "context", KV heads (and their query heads) over the other one, in the way of tensor parallelism.
    context_dim, heads_dim : str, optional
        Names of these dimensions, if they are others.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If the mesh does not serve, or ranks ask for different things.
    UnavailableError
        If `torch.distributed` is not set up.
    """

    name: ClassVar[str] = "distributed"

    def __init__(
        self, backend: str | Backend, mesh: Any, *, context_dim: str | None = None, heads_dim: str | None = None
    ) -> None:
        self.backend = get_backend(backend)
        if isinstance(self.backend, DistributedBackend):
            raise InvalidTypeError("backend", "must compute on one device", "another DistributedBackend")
        if not isinstance(self.backend.asarray([0.0], dtype="float32"), torch.Tensor):
            raise InvalidTypeError(
                "backend",
                "must compute on tensors of PyTorch",
                repr(self.backend.name),
                "Pass 'torch', or 'triton' on GPUs.",
            )
        over, heads = dimensions(mesh, self.backend, context_dim, heads_dim)
        self.mesh = mesh
        self.groups: list[dist.ProcessGroup] = mesh.get_all_groups()
        """A process group for each dimension of the mesh."""
        agree(
            self.groups,
            "mesh and backend",
            f"mesh {mesh.mesh.tolist()} with pages over {over!r}, heads over {heads!r}, backend {self.backend.name}",
            "Give every rank the same mesh, dimensions and backend.",
        )
        self.page_group: dist.ProcessGroup = mesh.get_group(over)
        """Ranks that hold pages of the same heads."""
        self.head_group: dist.ProcessGroup | None = None if heads is None else mesh.get_group(heads)
        """Ranks that hold other KV heads of the same pages."""
        self.sent: Counter[str] = Counter()
        """Bytes that this rank gave to collectives, by operator."""

    def __repr__(self) -> str:
        return f"DistributedBackend({self.backend!r}, {'x'.join(map(str, self.mesh.shape))} ranks)"

    @property
    def capabilities(self) -> Capabilities:
        """Those of the backend on each rank."""
        own = self.backend.capabilities
        return replace(own, notes=f"over {self.mesh.size()} ranks; {own.notes}")

    def why_not(self, problem: Problem) -> list[str]:
        """Return every reason of the backend on each rank."""
        return self.backend.why_not(problem)

    def asarray(self, values: Any, *, dtype: str | None = None) -> torch.Tensor:
        """Convert host values to tensors of the backend on this rank."""
        return cast("torch.Tensor", self.backend.asarray(values, dtype=dtype))

    def page_bounds(self, context: Context) -> ShardedBounds:
        """Return the bounds of all pages, on every rank."""
        bounds = self.backend.page_bounds(self._sharded(context).local)
        both = torch.stack([bounds.lower, bounds.upper])
        # All bytes of a page are 0 on the ranks that do not hold it, so their sums are its own bits.
        self._sum(both.view(torch.uint8), self.page_group, "page_bounds")
        return ShardedBounds(*both)

    def extend_bounds(self, context: Context, bounds: PageBounds, from_page: int) -> ShardedBounds:
        grown = super().extend_bounds(context, bounds, from_page)
        return ShardedBounds(grown.lower, grown.upper)

    def page_scores(self, q: torch.Tensor, bounds: PageBounds, *, active: torch.Tensor | None = None) -> torch.Tensor:
        return cast("torch.Tensor", self.backend.page_scores(q, bounds, active=active))

    def pooled_scores(
        self,
        q: torch.Tensor,
        context: Context,
        *,
        span: int,
        scale: float | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the masses of all pages, on every rank."""
        check_pooled_scores(q, context, span, scale, lse)
        here = self._sharded(context)
        if lse is None and self.page_group.size() > 1:
            rows = torch.ones((q.shape[0], q.shape[2]), dtype=torch.bool, device=q.device)
            lse = self.attend_pages(q, here, Selection.all_pages(here, q.shape[2]), rows, scale=scale).lse
        masses: torch.Tensor = self.backend.pooled_scores(q, here.local, span=span, scale=scale, lse=lse)
        return self._sum(masses, self.page_group, "pooled_scores")

    def top_pages(self, scores: torch.Tensor, count: int | torch.Tensor, *, eligible: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.backend.top_pages(scores, count, eligible=eligible))

    def query_change(self, q: torch.Tensor, q_reference: torch.Tensor) -> torch.Tensor:
        """Return the mean over the heads of all ranks."""
        if self.head_group is None or self.head_group.size() == 1:
            return cast("torch.Tensor", self.backend.query_change(q, q_reference))
        check_query_change(q, q_reference)
        # Sums, not means, so that nothing is rounded before all heads have been added.
        difference = q.to(compute_dtype(q)) - q_reference.to(compute_dtype(q))
        total = self._sum(difference.square().sum((1, 3)), self.head_group, "query_change")
        # A tensor, since PyTorch divides by a plain number as a product with its rounded inverse on a GPU.
        numbers = total.new_full((), self.head_group.size() * q.shape[1] * q.shape[3])
        return (total / numbers).to(torch.float32)

    def largest_changes(
        self, change: torch.Tensor, *, count: int | None = None, mass: float | None = None
    ) -> torch.Tensor:
        return cast("torch.Tensor", self.backend.largest_changes(change, count=count, mass=mass))

    def attend_pages(
        self,
        q: torch.Tensor,
        context: Context,
        selection: Selection,
        active: torch.Tensor,
        *,
        scale: float | None = None,
    ) -> AttentionState:
        part = self.backend.attend_pages(q, self._sharded(context).local, selection, active, scale=scale)
        if self._alone(q):
            return part
        return finish(self.backend, self._start_gather(part, "attend_pages")(), q.shape[3])[1]

    def attend_block(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
    ) -> AttentionState:
        return self.backend.attend_block(q, k, v, scale=scale)

    def merge(self, *states: AttentionState) -> AttentionState:
        return self.backend.merge(*states)

    def reuse(self, active: torch.Tensor, fresh: AttentionState, cached: AttentionState) -> AttentionState:
        return self.backend.reuse(active, fresh, cached)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        context: Context,
        selection: Selection,
        active: torch.Tensor,
        cached: AttentionState | None,
        *,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, AttentionState]:
        here = self._sharded(context).local
        if self._alone(q):
            return self.backend.attend(q, k, v, here, selection, active, cached, scale=scale)
        check_attend_block(q, k, v, scale)
        if cached is not None:
            check_cached(cached, q)
        part = self.backend.attend_pages(q, here, selection, active, scale=scale)
        gathered = self._start_gather(part, "attend")
        block = self.backend.attend_block(q, k, v, scale=scale)  # while the states are under way
        out, state = finish(self.backend, gathered(), q.shape[3], active, cached, block)
        return cast("torch.Tensor", out), state

    def _alone(self, q: torch.Tensor) -> bool:
        """Return whether there is nothing to exchange."""
        return self.page_group.size() == 1 or 0 in q.shape

    def _start_gather(self, part: AttentionState, what: str) -> Callable[[], torch.Tensor]:
        """Begin to gather the states of all ranks; the function returned waits for them."""
        mine = packed(part)
        self.sent[what] += mine.nbytes
        everyone = mine.new_empty((self.page_group.size(), *mine.shape))
        work = _all_gather(everyone.view(-1), mine.view(-1), group=self.page_group, async_op=True)

        def wait() -> torch.Tensor:
            work.wait()  # on a device the stream waits, not the host
            return everyone

        return wait

    def _sum(self, own: torch.Tensor, group: dist.ProcessGroup, what: str) -> torch.Tensor:
        """Add up, in place, what the ranks of a group have."""
        if group.size() > 1 and own.numel():
            self.sent[what] += own.nbytes
            dist.all_reduce(own, group=group)
        return own

    def _sharded(self, context: Context) -> ShardedContext:
        """Return the context as shards; one rank holds all of any context."""
        if isinstance(context, ShardedContext):
            return context
        if not isinstance(context, Context):
            raise InvalidTypeError("context", "must be a ShardedContext", type(context).__name__)
        if self.page_group.size() > 1:
            raise InvalidArgumentError(
                "context",
                "must be a ShardedContext, which says the pages that this rank holds",
                type(context).__name__,
                "Make one with ShardedContext(..., held=...); pages held by every rank would count as often.",
            )
        return ShardedContext(
            context.k_pages,
            context.v_pages,
            context.page_table,
            context.page_lengths,
            context.page_segments,
            None,
            context.version,
            held=torch.ones_like(context.exists),
        )
