"""Failures and delays of other ranks, as one typed error on every rank and within a time limit.

Ranks tell each other through the store that `torch.distributed` was set up with. On the fast path nothing
is written or read: a rank looks only once it has waited for a while, or comes back after a long pause.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sparse_dlm_attn import InvalidArgumentError, SparseAttentionError

__all__ = ["RankError", "Watch"]

LOOK_EVERY = 0.05  # seconds between two looks at the store while waiting
GRACE = 0.5  # seconds in which other ranks may come to the same error
ADVICE = "Every rank stops; make the distributed backend again, on all of them, to go on."


class RankError(SparseAttentionError, RuntimeError):
    """Another rank failed, did not come in time, or does something else.

    Parameters
    ----------
    ranks : sequence of int
        The ranks at fault, as far as they are known.
    reason : str
        What happened.
    hint : str
        The next step.
    """

    def __init__(self, ranks: Sequence[int], reason: str, hint: str = ADVICE) -> None:
        self.ranks = tuple(ranks)
        self.reason = reason
        self.hint = hint
        super().__init__(f"{reason.rstrip('.')}. {hint}")


class Watch:
    """What the ranks of one mesh know of each other.

    Parameters
    ----------
    store : torch.distributed.Store
        Shared by all ranks.
    rank : int
        This one, counted in the whole job.
    ranks : sequence of int
        All ranks of the mesh.
    timeout : float
        Longest wait for another rank, in seconds.
    """

    def __init__(self, store: Any, rank: int, ranks: Sequence[int], timeout: float) -> None:
        self.rank, self.ranks, self.timeout = rank, tuple(ranks), timeout
        self._store = store
        # Ranks make their objects in one order, so the n-th of each rank belong together.
        mesh = f"{zlib.crc32(repr(self.ranks).encode()):08x}"
        self._made = f"sparse_dlm_attn/{mesh}/made/{rank}"
        number = store.add(self._made, 1)
        self._prefix = f"sparse_dlm_attn/{mesh}/{number}"
        self._calls = self._errors = 0
        self._failure: RankError | None = None
        self._came = time.monotonic()
        self._stops: list[Callable[[], None]] = []
        self._late_on_device: list[Callable[[], list[int]]] = []

    def on_failure(self, stop: Callable[[], None]) -> None:
        """Call ``stop`` when this rank gives up waiting for its device, to end what waits there."""
        self._stops.append(stop)

    def on_look(self, late: Callable[[], list[int]]) -> None:
        """Ask ``late`` for ranks that the device has missed, wherever that costs nothing."""
        self._late_on_device.append(late)

    def agree(self, what: str, value: str, hint: str, ranks: Sequence[int] | None = None) -> None:
        """Raise on every rank unless all of them give the same value.

        Parameters
        ----------
        what : str
            What is compared, for the message.
        value : str
            This rank's.
        hint : str
            What to do about a difference.
        ranks : sequence of int, optional
            Who compares; default: all.

        Raises
        ------
        InvalidArgumentError
            If another rank gave another value.
        RankError
            If a rank does not come within the time limit.
        """
        given = self.collect(what, value, ranks)
        others = {rank: theirs for rank, theirs in given.items() if theirs != value}
        if others:
            rank, theirs = next(iter(others.items()))
            raise InvalidArgumentError(
                what, "must be the same on every rank",
                f"{value} on rank {self.rank}, {theirs} on rank {rank}", hint,
            )

    def collect(self, what: str, value: str, ranks: Sequence[int] | None = None) -> dict[int, str]:
        """Return what every rank (or each of ``ranks``) gave under this name, ``{rank: value}``."""
        ranks = self.ranks if ranks is None else ranks
        self._store.set(f"{self._prefix}/{what}/{self.rank}", value)
        begun, missing = time.monotonic(), list(ranks)
        while missing:
            missing = [rank for rank in missing if not self._store.check([f"{self._prefix}/{what}/{rank}"])]
            if missing and time.monotonic() - begun > self.timeout:
                # Not told to the others: they wait for the same ranks, or have yet to begin.
                raise RankError(missing, self._waited(missing, f"before {what} was compared"))
            if missing:
                self.raise_if_failed()
                time.sleep(0.005)
        return {rank: self._store.get(f"{self._prefix}/{what}/{rank}").decode() for rank in ranks}

    def withdraw(self) -> None:
        """Undo the making of this object, so that all ranks can still come together later."""
        self._store.add(self._made, -1)

    def begin(self) -> None:
        """Note the start of an exchange; look at the store if this rank has not done so for long."""
        self._calls += 1
        self.check()

    def check(self) -> None:
        """Raise `RankError` if a failure is known here; ask the store only after long without an answer."""
        if self._failure is not None:
            raise self._failure
        self._look_at_device()
        if time.monotonic() - self._came > self.timeout / 2:
            self.raise_if_failed()
            self._came = time.monotonic()

    def wait(self, work: Any, what: str) -> None:
        """Wait until a collective on host memory is done.

        Parameters
        ----------
        work : torch.distributed.Work
            The collective.
        what : str
            The operator that needs it, for messages.

        Raises
        ------
        RankError
            If another rank failed, or did not come within the time limit.
        """
        self._until(work.is_completed, f"in {what}", 1e-3)
        self._came = time.monotonic()
        try:
            work.wait()
        except RuntimeError as error:
            self._lost(what, error)

    def wait_for_device(self, done: Callable[[], bool]) -> None:
        """Wait until ``done()`` is true, with the same failures as `wait`; then nothing waits there either.

        A collective on a device does not hold up the host, so it is here that the host notices.
        """
        try:
            self._until(done, "on the device", 1e-2)
            self._look_at_device()
        except RankError:
            for stop in self._stops:
                stop()
            raise
        self._came = time.monotonic()

    def _until(self, done: Callable[[], bool], where: str, eager: float) -> None:
        """Ask whether it is done, often for ``eager`` seconds; look at the store, and give up in time."""
        begun, looked = time.monotonic(), 0.0
        while not done():
            waited = time.monotonic() - begun
            if waited > looked + LOOK_EVERY:
                looked = waited
                self._store.set(f"{self._prefix}/at/{self.rank}", str(self._calls))
                self.raise_if_failed()
            if waited > self.timeout:
                self._give_up(self._late(), where)
            time.sleep(2e-5 if waited < eager else 5e-4)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the host; waiting for its device has a limit here.

        Raises
        ------
        RankError
            If the device waits for a rank that failed, or does not come within the time limit.
        """
        if tensor.device.type == "cpu":
            return tensor
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.wait_for_device(event.query)
        return tensor.cpu()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Tell the other ranks about any error raised inside, then let it go on.

        Where all of them raise at the same place, as they do when all get the same bad input, nobody waits
        for anybody, and everything stays as it was.
        """
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            self._errors += 1
            if not self._everyone_failed():
                self.fail(f"rank {self.rank} failed: {type(error).__name__}: {error}")
            raise

    def fail(self, reason: str, ranks: Sequence[int] | None = None) -> None:
        """Tell the other ranks; the first failure is the one that is told."""
        told = json.dumps({"ranks": list(ranks if ranks is not None else [self.rank]), "reason": reason})
        told = json.loads(self._store.compare_set(f"{self._prefix}/failed", "", told))
        self._failure = RankError(told["ranks"], told["reason"])

    def raise_if_failed(self) -> None:
        """Raise `RankError` if a failure was told."""
        key = f"{self._prefix}/failed"
        if self._store.check([key]):
            told = json.loads(self._store.get(key))
            self._failure = RankError(told["ranks"], told["reason"])
            raise self._failure

    def _everyone_failed(self) -> bool:
        """Return whether every rank raises an error after the same collective, waiting a little for it."""
        mark = f"{self._prefix}/error/{self._calls}/{self._errors}"
        self._store.set(f"{mark}/{self.rank}", "")
        everyone, begun = [f"{mark}/{rank}" for rank in self.ranks], time.monotonic()
        while not self._store.check(everyone):
            if time.monotonic() - begun > min(GRACE, self.timeout / 4):
                return False
            time.sleep(0.005)
        return True

    def _look_at_device(self) -> None:
        """Raise `RankError` if a kernel has waited for a rank in vain."""
        for late in self._late_on_device:
            ranks = late()
            if ranks:
                self._give_up(ranks, "on the device")

    def _late(self) -> list[int]:
        """Return the ranks that are not waiting in this collective, as far as they have told."""
        late = []
        for rank in self.ranks:
            key = f"{self._prefix}/at/{rank}"
            if not self._store.check([key]) or int(self._store.get(key)) < self._calls:
                late.append(rank)
        return late

    def _waited(self, late: Sequence[int], where: str) -> str:
        who = f"ranks {', '.join(map(str, late))}" if late else "some rank"
        return f"{who} did not come within {self.timeout:g} s {where}, seen from rank {self.rank}"

    def _give_up(self, late: Sequence[int], where: str) -> None:
        self.fail(self._waited(late, where), late)
        self.raise_if_failed()  # perhaps an earlier one, which says more

    def _lost(self, what: str, error: RuntimeError) -> None:
        time.sleep(LOOK_EVERY)  # whoever failed may be about to say why
        self.fail(f"the connection between ranks broke in {what}: {str(error)[:200]}", [])
        try:
            self.raise_if_failed()
        except RankError as told:
            raise told from error
