"""The collectives of one dimension of a mesh: few, small, and each of them counted."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparse_dlm_attn_distributed.watch import RankError, Watch

__all__ = ["Exchange", "Pending"]

# The new name of a function whose old one warns.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, eq=False)
class Pending:
    """A gather under way.

    Parameters
    ----------
    exchange : Exchange
        Where it was started.
    work : torch.distributed.Work
        The collective.
    result : torch.Tensor
        ``(ranks, *shape)``, valid after `wait`.
    what : str
        The operator that needs it.
    """

    exchange: Exchange
    work: Any
    result: torch.Tensor
    what: str

    def wait(self) -> torch.Tensor:
        """Return every rank's tensor; on a device the stream waits, not the host."""
        self.exchange.finish(self.work, self.what)
        return self.result


class Exchange:
    """Collectives over the ranks of one mesh dimension.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Their process group.
    watch : Watch
        Notices failures of other ranks.
    on_host : bool
        Whether tensors lie in host memory: then the host waits and watches while a collective runs.
    check : bool
        Compare operator, shape and dtype over the ranks before each collective.
    """

    def __init__(self, group: dist.ProcessGroup, watch: Watch, *, on_host: bool, check: bool) -> None:
        self.group, self.watch, self.on_host, self.check = group, watch, on_host, check
        self.size: int = group.size()
        self.rank: int = group.rank()
        self.sent: Counter[str] = Counter()
        """Bytes that this rank gave to collectives, by operator."""

    def start_gather(self, tensor: torch.Tensor, what: str) -> Pending:
        """Begin to gather one tensor of the same shape from every rank."""
        tensor = tensor.contiguous()
        self._begin(tensor, what)
        self.sent[what] += tensor.numel() * tensor.element_size()
        flat = torch.empty(self.size * tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        work = _gather(flat, tensor.reshape(-1), group=self.group, async_op=True)
        return Pending(self, work, flat.view(self.size, *tensor.shape), what)

    def gather(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Return every rank's tensor, ``(ranks, *shape)``."""
        return self.start_gather(tensor, what).wait()

    def reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType, what: str) -> torch.Tensor:
        """Return the sum or the maximum over the ranks, in new memory."""
        result = tensor.clone(memory_format=torch.contiguous_format)
        self._begin(result, what)
        self.sent[what] += result.numel() * result.element_size()
        self.finish(dist.all_reduce(result, op=operation, group=self.group, async_op=True), what)
        return result

    def finish(self, work: Any, what: str) -> None:
        """Wait for a collective: the host for host memory, the stream for a device."""
        if self.on_host:
            self.watch.wait(work, what)
        else:
            work.wait()

    def _begin(self, tensor: torch.Tensor, what: str) -> None:
        self.watch.begin()
        if not self.check:
            return
        does = f"{what} of {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        mine = torch.tensor([zlib.crc32(does.encode())], dtype=torch.int64, device=tensor.device)
        all_of = torch.empty(self.size, dtype=torch.int64, device=tensor.device)
        self.finish(_gather(all_of, mine, group=self.group, async_op=True), what)
        if bool((all_of != mine).any()):
            self._differ(does, all_of.tolist())

    def _differ(self, does: str, codes: list[int]) -> None:
        ranks = dist.get_process_group_ranks(self.group)
        others = [rank for rank, code in zip(ranks, codes, strict=True) if code != codes[self.rank]]
        reason = f"rank {ranks[self.rank]} is in {does}, ranks {', '.join(map(str, others))} are not"
        self.watch.fail(reason, others)
        raise RankError(
            others, reason,
            "Give every rank the same policy, block, passes and shapes; only the pages held may differ.",
        )

    def abort(self) -> None:
        """Stop collectives that wait on a device; the group cannot be used after that."""
        backend = self.group._get_backend(torch.device("cuda"))
        if hasattr(backend, "abort"):
            backend.abort()
