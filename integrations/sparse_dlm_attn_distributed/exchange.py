"""The exchanges of one dimension of a mesh: few, small, and each of them counted.

They go through collectives of `torch.distributed`, or through mailboxes in symmetric memory where the ranks
are GPUs of one host.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from sparse_dlm_attn import AttentionState, Backend, UnavailableError
from sparse_dlm_attn_distributed import launches, packing
from sparse_dlm_attn_distributed.launches import Block
from sparse_dlm_attn_distributed.mailbox import Mailboxes, reasons_against
from sparse_dlm_attn_distributed.watch import RankError, Watch

__all__ = ["Exchange", "Pending", "Way"]

Way = Literal["auto", "collective", "symmetric"]

ABORT_SECONDS = 5.0  # to wait for NCCL to stop

# The new name of a function whose old one warns.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, eq=False)
class Pending:
    """A gather under way.

    Parameters
    ----------
    exchange : Exchange
        Where it was started.
    work : torch.distributed.Work or None
        The collective; None for mailboxes, whose kernel waits itself.
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
        if self.work is not None:
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
        self._aborted = False
        self.sent: Counter[str] = Counter()
        """Bytes that this rank gave to exchanges, by operator."""
        self.place = ""
        """Which pass exchanges belong to, where they are compared."""
        self.mailboxes: Mailboxes | None = None
        self.why_collective: list[str] = []
        """Why exchanges do not go through symmetric memory; empty if they do, or if nobody asked."""
        if not on_host:
            # Communicators are made at the first collective, which waits on the host for every rank: now,
            # while all of them are known to be here.
            ready = torch.zeros(1, dtype=torch.int32, device="cuda")
            watch.on_failure(self.abort)
            watch.read(self.gather(ready, "the first exchange"))
            self.sent.clear()

    @property
    def way(self) -> str:
        """What exchanges go through: "collective" or "symmetric"."""
        return "collective" if self.mailboxes is None else "symmetric"

    def open_mailboxes(self, wanted: Way) -> None:
        """Go through symmetric memory from now on, if that is wanted and all ranks can.

        Raises
        ------
        UnavailableError
            On every rank, if it is wanted explicitly and some rank cannot.
        """
        if wanted == "collective" or (wanted == "auto" and (self.on_host or self.size == 1)):
            return
        members = dist.get_process_group_ranks(self.group)
        boxes, reasons = None, ["tensors lie in host memory"]
        if not self.on_host:
            device = torch.device("cuda", torch.cuda.current_device())
            reasons = reasons_against(self.watch, members, device, self.group.group_name)
            if not reasons:
                boxes, said = _tried(self.group, self.watch, device)
                told = self.watch.collect(f"mailboxes of {self.group.group_name}", said, members)
                reasons = [f"rank {rank}: {reason}" for rank, reason in told.items() if reason]
        if reasons and wanted == "symmetric":
            raise UnavailableError(
                "exchange='symmetric'", reasons, "Use exchange='collective', or 'auto' to take what works."
            )
        self.why_collective = reasons
        if boxes is not None and not reasons:
            self.mailboxes = boxes
            self.watch.on_failure(boxes.halt)
            self.watch.on_look(lambda: [members[boxes.missed]] if boxes.missed is not None else [])

    def start_gather(self, tensor: torch.Tensor, what: str) -> Pending:
        """Begin to gather one tensor of the same shape from every rank."""
        tensor = tensor.contiguous()
        self._begin(tensor, what)
        self.sent[what] += tensor.numel() * tensor.element_size()
        if self.mailboxes is not None:
            return Pending(self, None, self.mailboxes.gather(tensor), what)
        flat = torch.empty(self.size * tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        work = _gather(flat, tensor.reshape(-1), group=self.group, async_op=True)
        return Pending(self, work, flat.view(self.size, *tensor.shape), what)

    def gather(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Return every rank's tensor, ``(ranks, *shape)``."""
        return self.start_gather(tensor, what).wait()

    def reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType, what: str) -> torch.Tensor:
        """Return the sum or the maximum over the ranks, in new memory."""
        if self.mailboxes is not None:
            everyone = self.gather(tensor, what)
            return everyone.sum(0) if operation == dist.ReduceOp.SUM else everyone.amax(0)
        result = tensor.clone(memory_format=torch.contiguous_format)
        self._begin(result, what)
        self.sent[what] += result.numel() * result.element_size()
        self.finish(dist.all_reduce(result, op=operation, group=self.group, async_op=True), what)
        return result

    def merge(
        self, backend: Backend, part: AttentionState, what: str, *, block: Block | None = None,
        active: torch.Tensor | None = None, cached: AttentionState | None = None,
    ) -> tuple[torch.Tensor | None, AttentionState]:
        """Merge the states of all ranks, and finish the pass.

        Parameters
        ----------
        backend : Backend
            Merges, and attends to the block, where no kernel does it all at once.
        part : AttentionState
            This rank's state.
        what : str
            The operator.
        block : Block or None
            What every rank attends to itself; None for the context part alone.
        active : torch.Tensor or None
            bool ``(batch, tokens)``: rows that take the new state; needed with ``cached``.
        cached : AttentionState or None
            The state of all other rows.

        Returns
        -------
        tuple
            Output of the pass, None without a block, and its context part.
        """
        fused = launches.merges(part, block)
        if fused and self.mailboxes is not None:
            size = packing.packed_bytes(part.lse.numel(), part.out.shape[3], part.out.element_size())
            self.announce(what, part.out, size)
            return self.mailboxes.merged(part, active, cached, block)
        pending = self.start_gather(packing.packed(part), what)
        if fused:
            return launches.merge_gathered(pending.wait(), part, active, cached, block)
        own = None
        if block is not None:  # while the states are under way
            own = backend.attend_block(block.q, block.k, block.v, scale=block.scale)
        state = backend.merge(*packing.unpacked(pending.wait(), part))
        if cached is not None and active is not None:
            state = backend.reuse(active, state, cached)
        return (None if own is None else backend.merge(state, own).out), state

    def announce(self, what: str, of: torch.Tensor, size: int) -> None:
        """Note an exchange that a kernel runs itself: ``size`` bytes that belong to the tensor ``of``."""
        self._begin(of, what)
        self.sent[what] += size

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
        does += f" in {self.place}" if self.place else ""
        mine = torch.tensor([zlib.crc32(does.encode())], dtype=torch.int64, device=tensor.device)
        if self.mailboxes is not None:
            all_of = self.mailboxes.gather(mine).flatten()
        else:
            all_of = torch.empty(self.size, dtype=torch.int64, device=tensor.device)
            self.finish(_gather(all_of, mine, group=self.group, async_op=True), what)
        codes = self.watch.read(all_of).tolist()
        if len(set(codes)) > 1:
            self._differ(does, codes)

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
        if self.on_host or self._aborted:
            return
        self._aborted = True
        backend = self.group._get_backend(torch.device("cuda"))
        if hasattr(backend, "abort"):
            # It has been seen to hang itself, in some versions of NCCL.
            stopping = threading.Thread(target=backend.abort, daemon=True)
            stopping.start()
            stopping.join(ABORT_SECONDS)


def _tried(group: dist.ProcessGroup, watch: Watch, device: torch.device) -> tuple[Mailboxes | None, str]:
    """Return mailboxes that have carried a message, or why there are none."""
    try:
        boxes = Mailboxes(group, watch, device)
        return boxes, "" if boxes.carries() else "a message did not arrive"
    except RankError:
        raise
    except Exception as error:  # of many kinds: mapping memory of another process needs rights and drivers
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
