"""Functions on tensors as custom operators of PyTorch, for backends that compute with it; imports PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CustomOperator", "custom_operator"]


class CustomOperator:
    """A function that `torch.compile` takes for one opaque operator, and that costs nothing outside of it.

    Parameters
    ----------
    name : str
        "namespace::name".
    schema : str
        Of its arguments and results, as `torch.library` writes it; it changes none of them.
    function : callable
        What it does.

    Attributes
    ----------
    opaque : torch.library.CustomOpDef
        What the compiler sees, for ``torch.library.opcheck``.
    """

    def __init__(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        self.opaque = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        self._function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        """Call the function; through the dispatcher, which takes some tens of microseconds, where it is traced."""
        traced = torch.compiler.is_compiling() or type(args[0]) is not torch.Tensor  # a fake one, say
        return self.opaque(*args) if traced else self._function(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Say what shapes the results have, as ``torch.library.register_fake`` does."""
        return self.opaque.register_fake(function)


def custom_operator(name: str, schema: str) -> Callable[[Callable[..., Any]], CustomOperator]:
    """Make a decorator that turns a function into a `CustomOperator`."""
    return lambda function: CustomOperator(name, schema, function)
