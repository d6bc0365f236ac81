"""What the tables of mistakes are made of: the reference or a policy with one method replaced.

A row names a mistake, the clauses that must find it, and a function of the `Call`. ``call.right(scale=1.0)``
is what the intact method returns with one argument changed; the arguments are attributes of the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from sparse_dlm_attn import AttentionState, Backend, PageBounds, PrefixAttentionPolicy, Selection
from sparse_dlm_attn_reference import ReferenceBackend

R = ReferenceBackend()


class Call:
    """One call of a replaced method: ``this`` object, its arguments, and the method as it should be."""

    def __init__(self, this: Any, intact: Callable[..., Any], given: dict[str, Any]) -> None:
        self.this, self.intact, self.given = this, intact, given
        self.unchanged: Any = None

    def __getattr__(self, name: str) -> Any:
        if name not in self.given:
            raise AttributeError(f"{name!r} is no argument of the replaced method: {', '.join(self.given)}")
        return self.given[name]

    def right(self, **changes: Any) -> Any:
        """Return what the intact method returns, with some arguments changed."""
        if not changes and self.unchanged is not None:
            return self.unchanged
        bound = inspect.BoundArguments(inspect.signature(self.intact), self.given | changes)
        answer = self.intact(*bound.args, **bound.kwargs)
        if not changes:
            self.unchanged = answer
        return answer

    def of(self, **changes: Any) -> Any:
        """Return the same with some fields of ``inputs`` changed."""
        return self.right(inputs=replace(self.inputs, **changes))


Mistake = Callable[[Call], Any]


@dataclass(frozen=True)
class Mutant:
    """A broken backend or policy and the clauses that name its mistake."""

    name: str
    clauses: tuple[str, ...]
    subject: Backend | PrefixAttentionPolicy[Any]
    method: str
    dtypes: tuple[str, ...] = ("float32",)


MUTANTS: dict[str, Mutant] = {}


def register(name: str, clauses: str, subject: Any, method: str = "", dtypes: tuple[str, ...] = ("float32",)) -> None:
    assert name not in MUTANTS
    MUTANTS[name] = Mutant(name, tuple(clauses.split()), subject, method, dtypes)


def mutant(of: Any, method: str, clauses: str, **options: Any) -> Callable[[Mistake], Mistake]:
    """Register ``of``, the reference or a policy, with one method replaced by the decorated function."""

    def decorate(mistake: Mistake) -> Mistake:
        table(of, method, {mistake.__name__: (clauses, mistake)}, **options)
        return mistake

    return decorate


def table(of: Any, method: str, rows: dict[str, tuple[str, Mistake]], dtypes: tuple[str, ...] = ("float32",)) -> None:
    """Register ``of`` with one method replaced by each of ``rows``: clauses and mistake by name."""
    kind = type(of)
    signature = inspect.signature(getattr(kind, method))
    parameters = {f.name: getattr(of, f.name) for f in fields(of) if f.init} if of is not R else {}
    for name, (clauses, mistake) in rows.items():

        def replaced(this: Any, *arguments: Any, mistake: Mistake = mistake, **options: Any) -> Any:
            bound = signature.bind(this, *arguments, **options)
            bound.apply_defaults()
            _, *given = bound.arguments.items()
            whole = R if of is R else this  # a backend's intact operator never meets the broken one
            return mistake(Call(this, getattr(kind, method).__get__(whole), dict(given)))

        members = {method: replaced, "name": name} if of is R else {method: replaced}
        register(name, clauses, type(name, (kind,), members)(**parameters), method, dtypes)


class Instead:
    """A backend that does one thing otherwise."""

    def __init__(self, ops: Any, **methods: Callable[..., Any]) -> None:
        self.ops = ops
        vars(self).update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)


def state(out: Any, lse: Any, like: Any) -> AttentionState:
    """Return a state of the dtypes of the state ``like``."""
    return AttentionState(np.asarray(out).astype(like.out.dtype), np.asarray(lse).astype(np.float32))


def kept(full: AttentionState, rows: Any) -> AttentionState:
    """Return a state with the other rows empty; ``rows`` broadcasts to the lse."""
    return state(np.where(rows[..., None], full.out, 0), np.where(rows, full.lse, -np.inf), full)


def with_lengths(context: Any, lengths: Any) -> Any:
    return replace(context, page_lengths=np.asarray(lengths, dtype=np.int32))


def both(bounds: PageBounds, change: Callable[[Any], Any]) -> PageBounds:
    """Return bounds with ``change`` made to either side, in their dtype."""
    return PageBounds(*(change(side).astype(side.dtype) for side in (bounds.lower, bounds.upper)))


def first(values: Any, count: int, axis: int, filler: Any = 0) -> Any:
    """Return ``values`` with all but the first ``count`` along an axis replaced."""
    shape = [1] * values.ndim
    shape[axis] = -1
    return np.where((np.arange(values.shape[axis]) < count).reshape(shape), values, filler).astype(values.dtype)


def chosen(selection: Selection, mask: Any, span: int | None = None) -> Selection:
    return Selection(np.array(mask), span or selection.span)


def of_first(values: Any) -> Any:
    """Return an array in which every sequence has the values of the first."""
    return np.repeat(values[:1], len(values), axis=0)
