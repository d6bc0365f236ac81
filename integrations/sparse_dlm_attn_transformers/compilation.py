"""What ``torch.compile`` leaves out: a pass's bookkeeping runs as Python, and the model around it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["eager", "eager_throughout"]

F = TypeVar("F", bound=Callable[..., Any])
disable: Any = torch.compiler.disable


def eager(function: F) -> F:
    """Return a function that is never compiled; what it calls may be."""
    found: F = disable(function, recursive=False)
    return found


def eager_throughout(function: F) -> F:
    """Return a function that is never compiled, and nothing that it calls is."""
    found: F = disable(function)
    return found
