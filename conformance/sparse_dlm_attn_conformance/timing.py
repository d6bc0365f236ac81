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

__all__ = ["TimeLimitExceeded", "time_limit"]


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

    with suppress(ValueError, OSError, AttributeError):  # no usable stderr: go on without the last resort
        faulthandler.dump_traceback_later(5 * seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    previous = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    outer, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        faulthandler.cancel_dump_traceback_later()
        if outer:  # another watchdog's timer was running: give it the rest of its time back
            left = max(0.001, outer - (time.monotonic() - started))
            signal.setitimer(signal.ITIMER_REAL, left, interval)
