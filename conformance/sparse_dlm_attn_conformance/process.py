"""Settings of the process that foreign code may change: look at them, and put them back."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

__all__ = ["changed_settings", "other_settings", "restored", "settings_of_the_process", "stirred_settings"]


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
