"""What broken backends are made of: the reference with one operator replaced, and a register of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparse_dlm_attn_reference import ReferenceBackend

R = ReferenceBackend()
Method = Callable[..., Any]


@dataclass(frozen=True)
class Mutant:
    """A broken backend and the clauses that name its mistake."""

    name: str
    clauses: tuple[str, ...]
    backend: ReferenceBackend
    dtypes: tuple[str, ...]


BACKENDS: dict[str, Mutant] = {}


def broken(
    *clauses: str, operator: str = "", dtypes: tuple[str, ...] = ("float32",)
) -> Callable[[Method], Method]:
    """Register a reference whose ``operator`` is the decorated function; its name says what is wrong."""

    def register(function: Method) -> Method:
        name, target = function.__name__, operator or "attend_pages"
        method = scores_of_all_rows(function) if target == "page_scores" else function
        kind = type(name, (ReferenceBackend,), {"name": name, target: method})
        BACKENDS[name] = Mutant(name, clauses, kind(), dtypes)
        return function

    return register


def scores_of_all_rows(function: Method) -> Method:
    """Let a mutant of `page_scores` take ``active`` and score every row all the same."""
    return lambda self, q, bounds, *, active=None: function(self, q, bounds)


def quiet(function: Method) -> Method:
    def run(*arguments: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*arguments, **options)

    run.__name__ = function.__name__
    return run


def with_lengths(context: Any, lengths: Any) -> Any:
    return replace(context, page_lengths=np.asarray(lengths, dtype=np.int32))
