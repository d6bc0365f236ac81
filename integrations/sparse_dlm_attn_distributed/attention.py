"""The driver over many devices: one call runs one pass of one layer on every rank."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

from sparse_dlm_attn import (
    Backend,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PassInfo,
    PrefixAttention,
    PrefixAttentionPolicy,
)
from sparse_dlm_attn.arrays import is_readable, to_numpy
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn_distributed.backend import DistributedBackend
from sparse_dlm_attn_distributed.context import ShardedContext
from sparse_dlm_attn_distributed.mesh import agree, ask, same

__all__ = ["DistributedAttention"]


class DistributedAttention(PrefixAttention):
    """Sparse attention of a block over a context whose pages are spread over the ranks of a mesh.

    Called like :class:`sparse_dlm_attn.PrefixAttention`, on every rank, with the same block and pass and
    each rank's own `ShardedContext`. When it is made, ranks compare policy, backend and mesh; when a block
    starts, shapes, lengths and who holds which page.

    Parameters
    ----------
    policy : str or PrefixAttentionPolicy
        Any policy; over a dimension of heads, one that does not mix heads.
    backend : str or Backend
        Computes on each rank.
    mesh : torch.distributed.device_mesh.DeviceMesh
        See `DistributedBackend`.
    context_dim, heads_dim : str, optional
        See `DistributedBackend`.
    check_contents : bool, optional
        Whether to read tables, lengths and ownership to check them, and to compare ranks when a block
        starts, for which the host waits. Default: where they lie in host memory.

    Raises
    ------
    InvalidArgumentError
        If ranks differ in policy, backend or mesh, or the policy mixes heads that lie on different ranks.
    """

    backend: DistributedBackend

    def __init__(
        self,
        policy: str | PrefixAttentionPolicy[Any],
        backend: str | Backend,
        mesh: Any,
        *,
        context_dim: str | None = None,
        heads_dim: str | None = None,
        check_contents: bool | None = None,
    ) -> None:
        over = DistributedBackend(backend, mesh, context_dim=context_dim, heads_dim=heads_dim)
        super().__init__(policy, over, check_contents=check_contents)
        agree(over.groups, "policy", repr(self.policy), "Make it with the same parameters everywhere.")
        if self.policy.mixes_heads and over.head_group is not None and over.head_group.size() > 1:
            raise InvalidArgumentError(
                "policy",
                "must not choose pages by several KV heads, which lie on different ranks here",
                repr(self.policy),
                "Spread pages alone (a mesh of one dimension), or choose per KV head.",
            )

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        context: Context,
        memory: LayerMemory | None = None,
        info: PassInfo | None = None,
        *,
        scale: float | None = None,
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
        SparseAttentionError
            As on one device; and, on every rank, if ranks differ when a block starts. An error of one rank
            alone leaves the others waiting until their process group's time-out.
        """
        if not isinstance(context, ShardedContext):
            raise InvalidTypeError(
                "context",
                "must be a ShardedContext",
                type(context).__name__,
                "Make one with ShardedContext(..., held=...).",
            )
        index = info.index if isinstance(info, PassInfo) else 0
        starts = memory is None or (isinstance(index, int) and index == 0)
        read = is_readable(context.page_table) if self.check_contents is None else self.check_contents
        if starts and read:
            self._compare(q, k, v, context, info, scale)
        return super().__call__(q, k, v, context, memory, info, scale=scale)

    def _compare(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        context: ShardedContext,
        info: PassInfo | None,
        scale: float | None,
    ) -> None:
        """Raise, on every rank, unless all run one pass over one context and each page lies on one rank."""
        facts = {
            "q": _form(q),
            "k": _form(k),
            "v": _form(v),
            "info": "None"
            if not isinstance(info, PassInfo)
            else (f"pass {_listed(info.index)}, is_save {_listed(info.is_save)}, layer {info.layer}"),
            "scale": str(scale),
            "context.page_size": str(context.page_size),
            "context.version": str(context.version),
            "context.page_lengths": _digest(context.page_lengths),
            "context.page_segments": _digest(context.page_segments),
        }
        heads, held = self.backend.head_group, to_numpy(context.resident)
        column = 0 if heads is None else heads.rank()
        said = ask(self.backend.groups, (facts, column, held))
        for name, fact in facts.items():
            same(
                [others[name] for others, _, _ in said],
                fact,
                name,
                "Give every rank the same block, pass and context; only the pages held may differ.",
            )
        holders = sum(theirs.astype(int) for _, of_column, theirs in said if of_column == column)
        wrong = (holders != 1) & to_numpy(context.exists)
        if wrong.any():
            sequence, page = np.argwhere(wrong)[0].tolist()
            raise InvalidArgumentError(
                "context.held",
                "must give each existing page to exactly one rank",
                f"{int(holders[sequence, page])} ranks for page {page} of sequence {sequence}",
                "Derive it from one rule, as in held = owner_of_page == rank.",
            )


def _form(tensor: torch.Tensor | None) -> str:
    """Write dtype and shape of a tensor; whatever else was given is refused later."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _listed(value: Any) -> str:
    """Write a number, or an array of one a sequence."""
    return str(to_numpy(value).tolist()) if hasattr(value, "shape") else str(value)


def _digest(values: torch.Tensor | None) -> str:
    """Write how many numbers there are a sequence, their sums and a checksum."""
    if values is None:
        return "None"
    host = to_numpy(values)
    return f"{host.shape[1]} pages, sums {host.sum(1).tolist()}, checksum {zlib.crc32(host.tobytes()):08x}"
