"""A time limit for foreign code: a hang becomes a failure with a stack, not a stuck run."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["TimeLimitExceeded", "last_resort", "time_limit"]

_armed: float | None = None  # when the last resort was armed, None: it is not


@contextmanager
def last_resort(seconds: float) -> Iterator[None]:
    """Keep the last resort of `time_limit` armed over many limits: arming it costs a thread each time.

    Short limits arm it on their own, since what goes on between two of them must not count.
    """
    if _armed is not None or seconds < 30:
        yield
        return
    with _armed_for(seconds):
        yield


@contextmanager
def _armed_for(seconds: float) -> Iterator[None]:
    global _armed
    try:
        _arm(seconds)
        yield
    finally:
        _armed = None
        faulthandler.cancel_dump_traceback_later()


def _arm(seconds: float) -> None:
    """Let the process end after five times ``seconds``; not again while at least four times are left."""
    global _armed
    now = time.monotonic()
    if _armed is None or now - _armed > seconds:
        _armed = now
        with suppress(ValueError, OSError, AttributeError):  # no usable stderr: go on without it
            faulthandler.dump_traceback_later(5 * seconds, exit=True, file=sys.__stderr__ or sys.stderr)


class TimeLimitExceeded(BaseException):
    """Foreign code ran past the limit.

    It is no `Exception`, so that neither the code under test nor Hypothesis takes it for a failure
    that is worth running again.
    """


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Interrupt the block after ``seconds``; 0 switches the limit off.

    A signal interrupts Python code. Code that never returns to the interpreter (a kernel that spins)
    cannot be interrupted: after five times the limit the process prints every stack and ends.
    """
    if seconds <= 0:
        yield
        return
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise TimeLimitExceeded(f"{what} ran longer than {seconds:g} s")

    if _armed is None:
        with _armed_for(seconds), time_limit(seconds, what):
            yield
        return
    _arm(seconds)
    previous = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    outer, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if outer:  # another watchdog's timer was running: give it the rest of its time back
            left = max(0.001, outer - (time.monotonic() - started))
            signal.setitimer(signal.ITIMER_REAL, left, interval)
