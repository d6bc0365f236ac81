"""Guards for foreign code: a time limit, and settings of the process that it may change and that are put back."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import numpy as np

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


def settings_of_the_process() -> dict[str, Any]:
    """Return what operators have to leave alone: floating-point modes, random states, PyTorch's defaults."""
    found: dict[str, Any] = {
        "numpy.geterr()": np.geterr(),
        "the state of numpy.random": _digest(np.random.get_state(legacy=True)),
        "the state of random": hash(random.getstate()),
        "os.getcwd()": os.getcwd(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_default_dtype"):
        found |= {
            "torch.get_default_dtype()": torch.get_default_dtype(),
            "torch.get_default_device()": str(torch.get_default_device()),
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
            "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
            "torch.get_num_threads()": torch.get_num_threads(),
            "the state of torch's random numbers": hash(torch.get_rng_state().numpy().tobytes()),
        }
    return found


def stirred_settings() -> dict[str, Any]:
    """Return the settings after a draw from the random states of NumPy and Python.

    Hypothesis seeds them with 0 before each problem, and so does careless code: it would not show.
    """
    np.random.random()
    random.random()
    return settings_of_the_process()


def _digest(state: Any) -> int:
    return hash((state[1].tobytes(), *state[2:]))


def changed_settings(before: dict[str, Any], *, random_states: bool = True) -> list[str]:
    """Say which settings differ from ``before``, and how; states of random numbers are too long to show."""
    now = settings_of_the_process()
    changed = [name for name, value in before.items() if now.get(name, value) != value]
    states = [name for name in changed if name.startswith("the state")]
    return (states if random_states else []) + [
        f"{name} was {before[name]}, now {now[name]}" for name in changed if name not in states
    ]


def other_settings(device_kind: str) -> dict[str, AbstractContextManager[None]]:
    """Return what others may have set in PyTorch, by name: each holds within a context."""
    torch: Any = sys.modules["torch"]

    @contextmanager
    def default(set_it: Callable[[Any], None], value: Any, usual: Any) -> Iterator[None]:
        set_it(value)
        try:
            yield
        finally:
            set_it(usual)

    usual = torch.get_default_dtype()
    return {
        "torch.autocast in bfloat16": torch.autocast(device_kind, dtype=torch.bfloat16),
        "torch.set_default_device('meta')": default(torch.set_default_device, "meta", None),
        "torch.set_default_dtype(torch.float64)": default(torch.set_default_dtype, torch.float64, usual),
    }


@contextmanager
def restored() -> Iterator[None]:
    """Put back, after the block, every setting of the process that would spoil later computations.

    Warnings are silent inside it, whatever the filters of the run.
    """
    modes, folder = np.geterr(), os.getcwd()
    torch: Any = sys.modules.get("torch")
    torch = torch if hasattr(torch, "set_default_device") else None
    if torch is not None:
        kept = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(),
            torch.get_num_threads(),
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign code may warn about NaN, and that is no failure
            yield
    finally:
        np.seterr(**modes)
        if os.getcwd() != folder:
            os.chdir(folder)
        if torch is not None:
            torch.set_default_dtype(kept[0])
            torch.set_grad_enabled(kept[1])
            torch.set_float32_matmul_precision(kept[2])
            if torch.get_num_threads() != kept[3]:
                torch.set_num_threads(kept[3])
            if str(torch.get_default_device()) != "cpu":
                torch.set_default_device(None)
