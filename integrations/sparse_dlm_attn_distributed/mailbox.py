"""Mailboxes in symmetric memory: what the GPUs of one host write to each other without a collective.

`torch.distributed._symmetric_memory` maps memory of every rank into all others, over NVLink or PCIe. Kernels
that use it are in `kernels`. Nothing here uses multicast. Where a machine refuses to set that up, set
``TORCH_SYMM_MEM_DISABLE_MULTICAST=1`` before PyTorch is imported.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparse_dlm_attn import AttentionState, InvalidArgumentError
from sparse_dlm_attn_distributed import launches
from sparse_dlm_attn_distributed.packing import packed_bytes
from sparse_dlm_attn_distributed.watch import Watch

__all__ = ["Mailbox", "Mailboxes", "reasons_against"]

TRIAL_SECONDS = 20.0  # for the first message, which waits until all ranks have compiled its kernel
ALIGNMENT = 256  # bytes: flags and messages begin where any access may


@dataclass(frozen=True, eq=False)
class Mailbox:
    """Memory for one size of message: two messages of each rank, and a flag for each rank and program.

    Parameters
    ----------
    table : torch.Tensor
        int64 ``(ranks + 1,)`` on the device: address of each rank's mailbox, then of the host's word.
    epochs : torch.Tensor
        int32 ``(programs,)``: exchanges that each program has done.
    space : int
        Bytes from message to message.
    programs : int
        Programs that share an exchange.
    memory : object
        Keeps the mapped memory alive.
    """

    table: torch.Tensor
    epochs: torch.Tensor
    space: int
    programs: int
    memory: Any

    @property
    def flags_at(self) -> int:
        """Where flags begin, in bytes."""
        return 2 * (self.table.numel() - 1) * self.space


class Mailboxes:
    """The mailboxes of the ranks that hold pages, made when a size of message is first seen.

    Exchanges of one object follow each other on one stream at a time, in the same order on every rank.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        The ranks, all on this host.
    watch : Watch
        Makes sure that all ranks are there before they wait for each other.
    device : torch.device
        This rank's.
    """

    def __init__(self, group: dist.ProcessGroup, watch: Watch, device: torch.device) -> None:
        self.group, self.watch, self.device = group, watch, device
        self.ranks, self.rank = group.size(), group.rank()
        self._members = dist.get_process_group_ranks(group)
        self._made: dict[tuple[int, int], Mailbox] = {}
        self._stopped = torch.zeros(1, dtype=torch.int32, device=device)
        self._told = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=True)
        self._seen = self._told.numpy()  # a look at it costs the host next to nothing
        self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._halt = torch.full((1,), -1, dtype=torch.int32, device="cpu", pin_memory=True)

    @property
    def missed(self) -> int | None:
        """Rank (of the group) for which a kernel has waited in vain, None if there is none."""
        return int(self._seen[0]) - 1 if self._seen[0] > 0 else None

    def halt(self) -> None:
        """End the waits of kernels that run now or later; what they give is NaN."""
        with torch.cuda.stream(self._aside):  # a copy needs no multiprocessor, which may be taken
            self._stopped.copy_(self._halt, non_blocking=True)

    def carries(self) -> bool:
        """Return whether a first message arrives."""
        got = self.gather(torch.full((1,), self.rank, dtype=torch.int32, device=self.device))
        event, begun = torch.cuda.Event(), time.monotonic()  # type: ignore[no-untyped-call]
        event.record()
        while not event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() - begun > TRIAL_SECONDS:
                self.halt()
                return False
            time.sleep(1e-3)
        return got.flatten().tolist() == list(range(self.ranks))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every rank's tensor, ``(ranks, *shape)``."""
        flat = tensor.contiguous().reshape(-1)
        size = flat.numel() * flat.element_size()
        if size == 0:
            return flat.new_empty((self.ranks, *tensor.shape))
        if size % 4:
            filled = torch.zeros(-(-size // 4) * 4, dtype=torch.uint8, device=flat.device)
            filled[:size] = flat.view(torch.uint8)
            source = filled.view(torch.int32)
        else:
            source = flat.view(torch.int32)
        programs = launches.programs_of_gather(source.numel(), self.device)
        box = self.box(source.numel() * 4, programs)
        result = torch.empty((self.ranks, source.numel()), dtype=torch.int32, device=flat.device)
        launches.gather(self, box, source, result)
        if size % 4:
            return result.view(torch.uint8)[:, :size].contiguous().view(tensor.dtype).view(-1, *tensor.shape)
        return result.view(tensor.dtype).view(self.ranks, *tensor.shape)

    def merged(
        self, part: AttentionState, active: torch.Tensor | None, cached: AttentionState | None,
        block: launches.Block | None,
    ) -> tuple[torch.Tensor | None, AttentionState]:
        """Return the output of a pass and its context part from the states of all ranks, in one launch.

        Parameters
        ----------
        part : AttentionState
            This rank's.
        active : torch.Tensor or None
            bool ``(batch, tokens)``: rows that take the new state; needed with ``cached``.
        cached : AttentionState or None
            The state of all other rows.
        block : Block or None
            What every rank attends to itself; None for the context part alone.
        """
        rows = part.lse.numel()
        size = packed_bytes(rows, part.out.shape[3], part.out.element_size())
        box = self.box(size, launches.programs_of_merge(rows, self.device))
        return launches.merge_sent(self, box, part, active, cached, block)

    @property
    def words(self) -> tuple[torch.Tensor, int]:
        """The device's word that ends waits, and the longest wait in nanoseconds."""
        return self._stopped, int(max(self.watch.timeout, TRIAL_SECONDS if len(self._made) < 2 else 0) * 1e9)

    def box(self, size: int, programs: int) -> Mailbox:
        """Return the mailbox for messages of ``size`` bytes that ``programs`` share, a new one if need be."""
        key = size, programs
        if key not in self._made:
            if torch.cuda.is_current_stream_capturing():
                raise InvalidArgumentError(
                    "q", "must have a shape that was exchanged before a CUDA graph is captured",
                    f"messages of {size} bytes", "Run the pass once without capturing it.",
                )
            self._made[key] = self._make(size, programs)
        return self._made[key]

    def _make(self, size: int, programs: int) -> Mailbox:
        from torch.distributed import _symmetric_memory as symmetric

        name = f"mailbox {len(self._made)} of {self.group.group_name}"
        self.watch.agree(
            name, f"{size} bytes, {programs} programs", "Give every rank the same shapes.", self._members
        )
        space = -(-size // ALIGNMENT) * ALIGNMENT
        total = 2 * self.ranks * space + -(-4 * self.ranks * programs // ALIGNMENT) * ALIGNMENT
        memory = symmetric.empty(total, dtype=torch.uint8, device=self.device)
        memory.zero_()
        handle = symmetric.rendezvous(memory, self.group)
        torch.cuda.current_stream().synchronize()
        everyone = [handle.get_buffer(rank, (total,), torch.uint8) for rank in range(self.ranks)]
        addresses = [buffer.data_ptr() for buffer in everyone]
        table = torch.tensor([*addresses, self._told.data_ptr()], dtype=torch.int64, device=self.device)
        epochs = torch.zeros(programs, dtype=torch.int32, device=self.device)
        torch.cuda.current_stream().synchronize()
        # Nobody writes before all have emptied theirs.
        self.watch.collect(f"{name} is empty", "", self._members)
        return Mailbox(table, epochs, space, programs, (memory, handle, everyone))


def reasons_against(watch: Watch, members: list[int], device: torch.device, name: str) -> list[str]:
    """Return why these ranks cannot use symmetric memory, the same on all of them; empty if they can.

    Parameters
    ----------
    watch : Watch
        Compares what ranks find.
    members : list of int
        The ranks of the group, counted in the whole job.
    device : torch.device
        This rank's.
    name : str
        Of the group, to tell this comparison from others.
    """
    mine = []
    try:
        import torch.distributed._symmetric_memory
        import triton  # noqa: F401
    except ImportError as error:
        mine.append(str(error))
    if torch.cuda.get_device_capability(device) < (7, 0):
        mine.append("the GPU is too old")
    card = torch.cuda.get_device_properties(device)
    kind = f"{card.name} with {card.multi_processor_count} multiprocessors"
    place = [socket.gethostname(), kind, str(getattr(card, "uuid", device.index)), "; ".join(mine)]
    told = watch.collect(f"place in {name}", json.dumps(place), members)
    found = {rank: json.loads(given) for rank, given in told.items()}
    hosts, kinds = ({given[part] for given in found.values()} for part in (0, 1))
    if len(hosts) > 1:
        return [f"the ranks are on {len(hosts)} hosts"]
    if len(kinds) > 1:
        return [f"the GPUs differ: {', '.join(sorted(kinds))}"]
    if len({given[2] for given in found.values()}) < len(found):
        return ["two ranks share a GPU"]
    return [f"rank {rank}: {given[3]}" for rank, given in found.items() if given[3]]
