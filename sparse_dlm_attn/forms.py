"""Checks that look at the form of their arguments alone: made once for each form, not in every pass of every layer."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import weakref
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np

__all__ = ["Forms", "form_of", "once_a_form", "with_one_form"]

P = ParamSpec("P")
T = TypeVar("T", bound=type)
MOST = 4096
"""Forms that each check remembers."""
Reader = Callable[[Any], Hashable]


def form_of(value: Any) -> Hashable:
    """Return all that a check may look at: types, shapes, dtypes, devices, numbers; no array's contents.

    Raises
    ------
    TypeError
        If it must not be remembered: of arrays that want a gradient, whose check depends on a mode of PyTorch, and of
        tuples and lists.
    """
    kind = type(value)
    reader = _readers.get(kind)
    if reader is None:
        reader = _readers[kind] = _reader(kind, value)
    return reader(value)


def with_one_form(kind: T) -> T:
    """Remember the form of each object of a class, which lives long and never changes: a decorator."""
    reader = _of_fields(kind)
    read = operator.attrgetter(*(field.name for field in fields(kind)))
    kept: weakref.WeakKeyDictionary[Any, tuple[Hashable, list[Any]]] = weakref.WeakKeyDictionary()

    def form(value: Any) -> Hashable:
        known = kept.get(value)
        if known is None:
            tensors = [part for part in read(value) if hasattr(part, "requires_grad")]
            known = kept[value] = reader(value), tensors
        for tensor in known[1]:
            if tensor.requires_grad:
                raise TypeError("its check depends on a mode of PyTorch")
        return known[0]

    _readers[kind] = form
    return kind


def _reader(kind: type, value: Any) -> Reader:
    """Return how the form of objects of a class is read."""
    if is_dataclass(kind):
        return _of_fields(kind)
    if kind in (tuple, list):
        return _refused
    if not hasattr(value, "shape") or isinstance(value, np.generic):
        return lambda value: (kind, value)
    if hasattr(value, "requires_grad"):
        return _of_tensor
    return lambda value: (kind, value.shape, value.dtype, getattr(value, "device", None))


def _of_tensor(value: Any) -> Hashable:
    if value.requires_grad:
        raise TypeError("its check depends on a mode of PyTorch")
    return type(value), value.shape, value.dtype, value.device


def _of_fields(kind: Any) -> Reader:
    names = tuple(field.name for field in fields(kind))
    return lambda value: (kind, *[form_of(getattr(value, name)) for name in names])


def _refused(value: Any) -> Hashable:
    raise TypeError("it may hold arrays")


_readers: dict[type, Reader] = {}


class Forms:
    """Forms of arguments that a check has passed."""

    def __init__(self) -> None:
        self._passed: set[Hashable] = set()

    def __reduce__(self) -> tuple[type[Forms], tuple[()]]:
        """Copy and pickle as if nothing had passed yet."""
        return Forms, ()

    def check(self, check: Callable[..., None], *args: Any) -> None:
        """Call ``check(*args)``, unless it has passed for arguments of this form."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.compiler.is_compiling():  # sizes may be symbols
            return check(*args)
        try:
            form = tuple([form_of(arg) for arg in args])
            if form in self._passed:
                return None
        except TypeError:  # what cannot be hashed is for the check to refuse
            return check(*args)
        check(*args)
        if len(self._passed) >= MOST:
            self._passed.clear()
        self._passed.add(form)
        return None


def once_a_form(check: Callable[P, None]) -> Callable[P, None]:
    """Let a check pass at once for arguments of a form that it has passed before: a decorator."""
    forms, signature = Forms(), inspect.signature(check)

    @functools.wraps(check)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        forms.check(check, *(signature.bind(*args, **kwargs).args if kwargs else args))

    return checked
