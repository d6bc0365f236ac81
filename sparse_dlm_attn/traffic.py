"""What a pass read: density and bytes, computed when asked for and without a synchronisation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.ranked import RankedResult
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.values import PageBounds, short_repr

__all__ = ["RecordingOperators", "Traffic"]


@dataclass(frozen=True, eq=False)
class Traffic:
    """What one layer read of its context in one pass (clause DENSITY-1).

    Parameters
    ----------
    selection, active : Selection, array
        What the pass selected, and bool ``(batch, tokens)``: for which rows.
    q_heads, kv_heads : int
        Head counts.
    page_lengths : array
        int32 ``(batch, pages)``, of the context.
    token_bytes : int
        Bytes of a token's key and value in one KV head.
    metadata_reads, key_reads : int
        How often the policy read the bounds of all pages (two vectors a page, the size of one
        token), and how often it read all keys (to build bounds or pooled scores).
    """

    selection: Selection
    active: Array
    q_heads: int
    kv_heads: int
    page_lengths: Array
    token_bytes: int
    metadata_reads: int = 0
    key_reads: int = 0

    __repr__ = short_repr

    @cached_property
    def loaded(self) -> Array:
        """Bool ``(batch, kv_heads, pages)``: pages loaded, after the union over rows and group."""
        chosen = self.selection.loaded(self.active, self.q_heads, self.kv_heads)
        return chosen & (self.page_lengths > 0)[:, None, :]

    @property
    def context_tokens(self) -> Array:
        """float32 ``(batch,)``: valid context tokens, summed over KV heads."""
        xp = namespace(self.page_lengths)
        tokens = xp.sum(xp.astype(self.page_lengths, xp.float32), axis=-1)
        return tokens * self.kv_heads

    @property
    def tokens_read(self) -> Array:
        """float32 ``(batch,)``: context tokens loaded, summed over KV heads."""
        xp = namespace(self.page_lengths)
        lengths = xp.astype(self.page_lengths, xp.float32)[:, None, :]
        return xp.sum(xp.where(self.loaded, lengths, 0.0), axis=(1, 2))

    @property
    def density(self) -> Array:
        """float32 ``(batch,)``: tokens loaded / context tokens; 0 for an empty context."""
        xp = namespace(self.page_lengths)
        total = self.context_tokens
        return xp.where(total > 0, self.tokens_read / xp.where(total > 0, total, 1.0), 0.0)

    @property
    def pairs(self) -> Array:
        """float32 ``(batch,)``: pairs of an active row and a token it attends to, over query heads."""
        xp = namespace(self.page_lengths)
        mask = xp.astype(self.selection.for_query_heads(self.q_heads), xp.float32)
        tokens = xp.sum(mask * xp.astype(self.page_lengths, xp.float32)[:, None, None, :], axis=(1, 3))
        return xp.sum(tokens * self.selection.rows_of_spans(self.active), axis=-1)

    @property
    def dense_pairs(self) -> Array:
        """float32 ``(batch,)``: `pairs` of a pass in which every row attends to every token."""
        return self.context_tokens * (self.q_heads / self.kv_heads * int(self.active.shape[1]))

    @property
    def page_bytes(self) -> Array:
        """float32 ``(batch,)``: bytes of the pages loaded."""
        return self.tokens_read * self.token_bytes

    @property
    def metadata_bytes(self) -> Array:
        """float32 ``(batch,)``: bytes read to choose pages."""
        xp = namespace(self.page_lengths)
        pages = xp.sum(xp.astype(self.page_lengths > 0, xp.float32), axis=-1) * self.kv_heads
        bounds = pages * (self.token_bytes * self.metadata_reads)
        return bounds + self.context_tokens * (self.token_bytes / 2 * self.key_reads)

    @property
    def bytes_read(self) -> Array:
        """float32 ``(batch,)``: page bytes and metadata bytes."""
        return self.page_bytes + self.metadata_bytes

    @property
    def dense_bytes(self) -> Array:
        """float32 ``(batch,)``: what the dense policy would read."""
        return self.context_tokens * self.token_bytes


class RecordingOperators:
    """A backend's operators, with a count of what a policy reads to choose pages.

    Bounds are taken from the context, else from the previous pass of the block, else built; so a
    policy simply asks for ``page_bounds`` in every pass.
    """

    def __init__(self, backend: Backend, bounds: PageBounds | None) -> None:
        self._backend = backend
        self.bounds = bounds
        self.metadata_reads = 0
        self.key_reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def page_bounds(self, context: Context) -> PageBounds:
        """Return stored bounds, or build them once for the block."""
        if context.bounds is not None:
            return context.bounds
        if self.bounds is None:
            self.bounds = self._backend.page_bounds(context)
            self.key_reads += 1
        return self.bounds

    def page_scores(self, q: Array, bounds: PageBounds, *, active: Array | None = None) -> Array:
        """Count one read of the metadata."""
        self.metadata_reads += 1
        return self._backend.page_scores(q, bounds, active=active)

    def pooled_scores(
        self, q: Array, context: Context, *, span: int, scale: float | None = None, lse: Array | None = None
    ) -> Array:
        """Count one read of all keys."""
        self.key_reads += 1
        return self._backend.pooled_scores(q, context, span=span, scale=scale, lse=lse)

    def attend_ranked(self, *arguments: Any, **options: Any) -> RankedResult:
        """Count one read of the metadata."""
        self.metadata_reads += 1
        return self._backend.attend_ranked(*arguments, **options)

    def as_backend(self) -> Backend:
        """Return this object under the type that policies expect."""
        return cast(Backend, self)
