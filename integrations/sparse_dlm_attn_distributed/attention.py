"""The driver over many devices: one call runs one pass of one layer on every rank."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparse_dlm_attn import (
    Backend,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    LayerMemory,
    PassInfo,
    PrefixAttention,
    PrefixAttentionPolicy,
)
from sparse_dlm_attn.arrays import is_host, to_numpy
from sparse_dlm_attn_distributed.backend import DistributedBackend
from sparse_dlm_attn_distributed.context import ShardedContext

__all__ = ["DistributedAttention"]


class DistributedAttention(PrefixAttention):
    """Sparse attention of a block over a context whose pages are spread over the ranks of a mesh.

    Called like :class:`sparse_dlm_attn.PrefixAttention`, on every rank, with the same block and pass and
    each rank's own `ShardedContext`. Beyond that class it makes sure that all ranks run the same policy,
    that each page lies on exactly one rank, and that a failure on one rank is an error on all of them.

    Parameters
    ----------
    policy : str or PrefixAttentionPolicy
        Any policy; over a dimension of heads, one that does not mix heads.
    backend : str or Backend
        Computes on each rank.
    mesh : torch.distributed.device_mesh.DeviceMesh
        See `DistributedBackend`.
    check_contents : bool, optional
        Whether to read tables, lengths and ownership to check them; default: where they lie in host
        memory. Ownership is compared when a block starts.
    **options
        Of `DistributedBackend`.

    Raises
    ------
    InvalidArgumentError
        If ranks differ in policy, backend or mesh, or the policy mixes heads that lie on different ranks.
    RankError
        If a rank does not come, here or in any later call.
    """

    backend: DistributedBackend

    def __init__(
        self, policy: str | PrefixAttentionPolicy[Any], backend: str | Backend, mesh: Any, *,
        check_contents: bool | None = None, **options: Any,
    ) -> None:
        super().__init__(
            policy, DistributedBackend(backend, mesh, **options), check_contents=check_contents
        )
        heads, watch = self.backend.ranks.heads, self.backend.ranks.watch
        watch.agree("policy", repr(self.policy), "Make it with the same parameters everywhere.")
        if self.policy.mixes_heads and heads is not None and heads.size > 1:
            raise InvalidArgumentError(
                "policy", "must not choose pages by several KV heads, which lie on different ranks here",
                repr(self.policy), "Spread pages alone (a mesh of one dimension), or choose per KV head.",
            )

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, context: Context,
        memory: LayerMemory | None = None, info: PassInfo | None = None, *, scale: float | None = None,
    ) -> tuple[torch.Tensor, LayerMemory]:
        """Run one pass of one layer on this rank, in step with the others.

        Parameters
        ----------
        q, k, v
            As for :class:`sparse_dlm_attn.PrefixAttention`; the same on every rank, but for heads that
            are spread over ranks.
        context : ShardedContext
            The whole context, with the pages that this rank holds.
        memory, info, scale
            As for :class:`sparse_dlm_attn.PrefixAttention`; the same on every rank.

        Returns
        -------
        out : torch.Tensor
            ``(batch, q_heads, tokens, head_dim)``, the same on all ranks that hold these heads.
        memory : LayerMemory
            For the next pass. Its traffic is that of all ranks together.

        Raises
        ------
        RankError
            If another rank failed or does not come in time.
        SparseAttentionError
            As on one device; the other ranks then get `RankError`.
        """
        with self.guard():
            if not isinstance(context, ShardedContext):
                raise InvalidTypeError(
                    "context", "must be a ShardedContext", type(context).__name__,
                    "Make one with ShardedContext(..., held=...).",
                )
            self._announce(info, scale)
            starts = memory is None or not isinstance(info, PassInfo) or (
                isinstance(info.index, int) and info.index == 0
            )
            read = is_host(context.page_table) if self.check_contents is None else self.check_contents
            if read and starts:
                self._check_ownership(context)
            return super().__call__(q, k, v, context.with_held_lengths(), memory, info, scale=scale)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Tell the other ranks about an error raised inside, so that they need not wait for this one.

        Put it around the work between passes that may fail on one rank alone; calls have it already.
        """
        with self.backend.ranks.watch.guard():
            yield

    def synchronize(self) -> None:
        """Wait for this rank's GPU; see :meth:`DistributedBackend.synchronize`."""
        self.backend.synchronize()

    def _announce(self, info: PassInfo | None, scale: float | None) -> None:
        """Say which pass this is: ranks at different ones notice it where exchanges are compared."""
        ranks = self.backend.ranks
        if not ranks.pages.check:
            return
        place = "no PassInfo" if not isinstance(info, PassInfo) else (
            f"pass {_listed(info.index)}, is_save {_listed(info.is_save)}, layer {info.layer}"
        )
        for exchange in (ranks.pages, ranks.heads):
            if exchange is not None:
                exchange.place = f"{place}, scale {scale}"

    def _check_ownership(self, context: ShardedContext) -> None:
        """Raise, on every rank, unless all know one context and each of its pages lies on one rank."""
        known = zlib.crc32(f"{context.page_size} {context.version}".encode())
        known = zlib.crc32(to_numpy(context.page_lengths).tobytes(), known)
        if context.page_segments is not None:
            known = zlib.crc32(to_numpy(context.page_segments).tobytes(), known)
        known &= 0x7FFFFFFF
        device = context.k_pages.device
        told = torch.cat([
            torch.tensor([known], dtype=torch.int32, device=device),
            context.resident.reshape(-1).to(torch.int32),
        ])
        everyone = self.backend.ranks.watch.read(
            self.backend.ranks.pages.gather(told, "the check of ownership")
        )
        if bool((everyone[:, 0] != everyone[0, 0]).any()):
            raise InvalidArgumentError(
                "context", "must have the same page size, lengths, segments and version on every rank",
                "others on some rank", "Spread pages, not sequences; tell every rank of pages that grow.",
            )
        holders = everyone[:, 1:].sum(0).view(context.exists.shape)
        wrong = ((holders != 1) & context.exists.cpu()).nonzero()
        if wrong.numel():
            sequence, page = wrong[0].tolist()
            raise InvalidArgumentError(
                "context.held", "must give each existing page to exactly one rank",
                f"{int(holders[sequence, page])} ranks for page {page} of sequence {sequence}",
                "Derive it from one rule, as in held = owner_of_page == rank.",
            )


def _listed(value: Any) -> str:
    """Write a number, or an array of one a sequence."""
    return str(to_numpy(value).tolist()) if hasattr(value, "shape") else str(value)
