"""Parts of an operator side by side on a processor, each on one thread of the array library.

PyTorch splits one operation at a time among OpenMP's threads, and these spin or sleep in between. A sparse
pass is a hundred short operations, for which that costs more than it gains, and many times more where
another program wants a core. So an operator that falls into parts, one a KV head say, runs them here: in the
calling thread and in workers, with one thread of OpenMP and MKL each. A part is computed alike whoever
computes it, so results have the same bits for any number of threads.

How many threads a thread's operations may take is a setting of that thread alone in OpenMP and in MKL. It is
made through their C interface, since `torch.set_num_threads` changes it for the whole process. OpenMP's own
threads, which spin for some milliseconds after an operation of before, are dismissed while workers compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["one_thread", "run_parts", "short_operations", "threads_for"]

WORTH_SHARING = 1 << 20  # elements of keys read: below, waking a worker takes longer than it saves
MOST_BYTES = 64 << 20  # of a part: longer operations share their work well, and each part takes memory
SHORT = 1 << 18  # elements: an operation that is over before threads are awake

PartT = TypeVar("PartT")

_lent = threading.local()  # ``threads``: what `one_thread` has taken from this thread's operations


@functools.cache
def _library() -> ctypes.PyDLL:
    """Return PyTorch's own library, since a process may hold several OpenMP runtimes."""
    return ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


@functools.cache
def _setters() -> tuple[Callable[[int], object], Callable[[int], int]] | None:
    """Return what sets the calling thread's number of threads in OpenMP and in MKL, None if nothing does.

    MKL's returns the number before; 0 is that of the process.
    """
    try:
        symbols = _library()
        of_openmp = symbols.omp_set_num_threads
        has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        of_mkl = symbols.MKL_Set_Num_Threads_Local if has_mkl else None
    except (OSError, AttributeError):
        return None
    of_openmp.restype = None
    return of_openmp, (lambda count: 0) if of_mkl is None else of_mkl


@functools.cache
def _pause() -> Callable[[], object] | None:
    """Return OpenMP's call that ends the threads of the calling thread, None before OpenMP 5.0."""
    try:
        symbols = _library()
        pause, host = symbols.omp_pause_resource, symbols.omp_get_initial_device
    except (OSError, AttributeError):
        return None
    soft = 1  # what OpenMP knows of the program stays
    return functools.partial(pause, soft, host())


def _dismiss() -> None:
    """End the threads that OpenMP keeps for the calling thread; it starts others when it needs them.

    Where that cannot be done they stop spinning by themselves, somewhat later.
    """
    pause = _pause()
    # A process that was forked before this was imported has none, and would wait for them.
    if pause is not None and _native_threads() > 0:
        pause()


def _native_threads() -> int:
    """Return how many threads of this process are not Python's, 0 where Linux does not tell."""
    try:
        return len(os.listdir("/proc/self/task")) - threading.active_count()
    except OSError:
        return 0


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """Let the calling thread's operations use one thread meanwhile.

    Yields
    ------
    int
        How many threads they used before; 1 where nothing had to be, or could be, changed.
    """
    count, setters = torch.get_num_threads(), _setters()
    if count == 1 or setters is None:
        yield getattr(_lent, "threads", 1)  # within another, which has as many
        return
    of_openmp, of_mkl = setters
    before = of_mkl(1)
    try:
        of_openmp(1)
        _lent.threads = count
        yield count
    finally:
        _lent.threads = 1
        of_mkl(0 if before == count else before)  # for a thread without its own, MKL says the process's
        of_openmp(count)


@contextlib.contextmanager
def threads_for(parts: int, part_bytes: int, elements: int = WORTH_SHARING) -> Iterator[int]:
    """Choose between parts side by side, as `one_thread`, and operations that use all threads, as they come.

    Parameters
    ----------
    parts : int
        Parts of the work.
    part_bytes : int
        What the largest intermediate of a part may take.
    elements : int
        Elements that all parts read, if known: few are not worth a worker.

    Yields
    ------
    int
        Workers for `run_parts`.
    """
    threads = max(torch.get_num_threads(), getattr(_lent, "threads", 1))
    if part_bytes > MOST_BYTES or 2 * parts < threads:
        yield 0
        return
    with one_thread() as threads:
        yield min(threads, parts) - 1 if elements >= WORTH_SHARING else 0


@contextlib.contextmanager
def short_operations(tensor: torch.Tensor) -> Iterator[None]:
    """Keep to one thread for operations on a tensor of this size, if it is small and on a processor."""
    if tensor.device.type != "cpu" or tensor.numel() > SHORT:
        yield
        return
    with one_thread():
        yield


def run_parts(compute: Callable[[PartT], None], parts: Iterable[PartT], workers: int) -> None:
    """Call ``compute`` with every part, in the calling thread and in ``workers`` others; inside `one_thread`.

    Parameters
    ----------
    compute : callable
        Writes its result where no other part's goes. It runs in the gradient mode of the caller.
    parts : iterable
        What it is called with.
    workers : int
        Threads to use beside the calling one.

    Raises
    ------
    BaseException
        The first that a part raised, after all others have ended. Parts not begun by then are left out.
    """
    left = iter(parts)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def take_parts() -> None:
        try:
            while not failures:
                with lock:
                    part = next(left, left)
                if part is left:
                    return
                compute(part)  # type: ignore[arg-type]
        except BaseException as error:
            failures.append(error)

    inference = torch.is_inference_mode_enabled()

    def in_worker() -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            take_parts()

    helpers = []
    if workers > 0:
        _dismiss()
        helpers = _pool.submit(in_worker, workers)
    take_parts()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun has nothing left to do
            helper.result()
    if failures:
        raise failures[0]


class _Pool:
    """The workers of this process, started when first needed; a forked process starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0

    def submit(self, task: Callable[[], None], times: int) -> list[Future[None]]:
        """Start a task several times over; fewer times, or never, when the interpreter is ending."""
        started = []
        with self._lock, contextlib.suppress(RuntimeError):
            for _ in range(times):
                started.append(self._workers(times).submit(task))
        return started

    def _workers(self, size: int) -> ThreadPoolExecutor:
        if self._executor is None or self._size < size:
            if self._executor is not None:
                self._executor.shutdown(wait=False)  # what it has begun it still ends
            self._executor = ThreadPoolExecutor(size, "sparse_dlm_attn_torch", _start_worker)
            self._size = size
        return self._executor


def _start_worker() -> None:
    """Give a new worker one thread for the rest of its life."""
    torch.get_num_threads()  # sets up the thread, which would undo what follows
    setters = _setters()
    assert setters is not None  # else nobody asks for workers
    for setter in setters:
        setter(1)


_pool = _Pool()


def _forget_workers() -> None:
    """Begin anew after a fork, which copies neither threads nor who holds a lock."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    # OpenMP in the child would wait for threads that it believes to have, in any operation of PyTorch that is
    # shared out; it has none to believe in once they are dismissed.
    os.register_at_fork(before=_dismiss, after_in_child=_forget_workers)
