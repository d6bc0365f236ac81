"""What broken policies are made of: a policy with one method replaced, and a register of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparse_dlm_attn import PrefixAttentionPolicy, Selection


@dataclass(frozen=True)
class PolicyMutant:
    """A broken policy and the clauses that name its mistake."""

    name: str
    clauses: tuple[str, ...]
    policy: PrefixAttentionPolicy[Any]


POLICIES: dict[str, PolicyMutant] = {}

QUEST = {"budget": 4, "pages": "own", "union_over": "query_head"}
LOSA = {"budget": 4, "active": 2}


def broken(
    kind: type, method: str, *clauses: str, **parameters: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``kind`` with one method replaced; the function gets the intact method as ``right``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        intact = getattr(kind, method)

        def replaced(self: Any, *arguments: Any, **options: Any) -> Any:
            return function(self, lambda *a, **o: intact(self, *a, **o), *arguments, **options)

        mutant = type(function.__name__, (kind,), {method: replaced})
        POLICIES[function.__name__] = PolicyMutant(function.__name__, clauses, mutant(**parameters))
        return function

    return register


def select(selection: Selection, mask: Any) -> Selection:
    return Selection(mask, selection.span)
