"""Checks that look at the form of their arguments alone: made once for each form, not in every pass of every layer."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

__all__ = ["Forms", "form_of", "once_a_form", "with_one_form"]

P = ParamSpec("P")
T = TypeVar("T", bound=type)
MOST = 4096
"""Forms that each check remembers."""
_names: dict[type, tuple[str, ...]] = {}  # fields of the dataclasses met so far, () for other classes
_forms: dict[type, weakref.WeakKeyDictionary[Any, Hashable]] = {}


def with_one_form(kind: T) -> T:
    """Remember the form of each object of a class, which lives long and never changes: a decorator."""
    _forms[kind] = weakref.WeakKeyDictionary()
    return kind


def form_of(value: Any) -> Hashable:
    """Return all that a check may look at: types, shapes, dtypes, devices, numbers; no array's contents.

    Raises
    ------
    TypeError
        If it must not be remembered: of arrays that want a gradient, whose check depends on a mode of PyTorch, and of
        tuples and lists.
    """
    kind = type(value)
    names = _names.get(kind)
    if names is None:
        names = _names[kind] = tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()
    if names:
        kept = _forms.get(kind)
        if kept is None or value not in kept:
            form: Hashable = (kind, *[form_of(getattr(value, name)) for name in names])
            if kept is not None:
                kept[value] = form
            return form
        if any(getattr(getattr(value, name), "requires_grad", False) for name in names):
            raise TypeError("its check depends on a mode of PyTorch")
        return kept[value]
    if kind is tuple or kind is list:
        raise TypeError("it may hold arrays")
    if not hasattr(value, "shape"):
        return kind, value
    if getattr(value, "requires_grad", False):
        raise TypeError("its check depends on a mode of PyTorch")
    return kind, value.shape, value.dtype, getattr(value, "device", None)


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
            form = tuple(map(form_of, args))
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
