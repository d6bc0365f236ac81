"""Every operator as one call with the same shape, for laws that hold of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from sparse_dlm_attn import AttentionState, PageBounds
from sparse_dlm_attn.arrays import Array, is_array
from sparse_dlm_attn.ranked import RankedPass, RankedResult
from sparse_dlm_attn_conformance.cases import Arrays, Host
from sparse_dlm_attn_conformance.subjects import Loaded, Subject, host
from sparse_dlm_attn_conformance.tables import HostState

NAMES = (
    "page_bounds extend_bounds page_scores pooled_scores top_pages query_change largest_changes attend_pages "
    "attend_block merge reuse attend attend_ranked"
)
OPERATORS = tuple(NAMES.split())
OVER_CONTEXT = ("page_bounds", "pooled_scores", "attend_pages", "attend", "attend_ranked", "extend_bounds")


@dataclass(frozen=True, eq=False)
class Call:
    """One operator with its arguments, ready to run (again)."""

    operator: str
    run: Callable[[], Any]
    arguments: dict[str, Array]


def prepare(subject: Subject, arrays: Arrays, operator: str, on: Loaded | None = None) -> Call:
    """Return a call of one operator on the values of a problem."""
    on = on or subject.load(arrays)
    ops, scale = subject.backend, arrays.scale
    extra = _extra(subject, arrays, operator)
    changes = (
        subject.floats(((arrays.q - arrays.q_other) ** 2).mean(axis=(1, 3)), "float32")
        if operator == "largest_changes"
        else None
    )
    runs: dict[str, Callable[[], Any]] = {
        "page_bounds": lambda: ops.page_bounds(on.context),
        "extend_bounds": lambda: ops.extend_bounds(on.context, extra["bounds"], on.context.pages // 2),
        "page_scores": lambda: ops.page_scores(on.q, extra["bounds"]),
        "pooled_scores": lambda: ops.pooled_scores(on.q, on.context, span=arrays.span, scale=scale),
        "top_pages": lambda: ops.top_pages(extra["scores"], 2, eligible=extra["eligible"]),
        "query_change": lambda: ops.query_change(on.q, on.q_other),
        "largest_changes": lambda: ops.largest_changes(changes, mass=0.5),
        "attend_pages": lambda: ops.attend_pages(on.q, on.context, on.selection, on.active, scale=scale),
        "attend_block": lambda: ops.attend_block(on.q, on.k, on.v, scale=scale),
        "merge": lambda: ops.merge(extra["fresh"], extra["cached"]),
        "reuse": lambda: ops.reuse(on.active, extra["fresh"], extra["cached"]),
        "attend": lambda: ops.attend(
            on.q, on.k, on.v, on.context, on.selection, on.active, extra["cached"], scale=scale
        ),
        "attend_ranked": lambda: ops.attend_ranked(
            on.q,
            on.k,
            on.v,
            on.context,
            extra["bounds"],
            RankedPass(arrays.page_size, 2, reference=on.q_other, count=2, keep="queries"),
            extra["cached"],
            scale=scale,
        ),
    }
    arguments = on.arrays()
    for name, value in {**extra, "change": changes}.items():
        for part, array in arrays_in(value).items():
            arguments[f"{name}{part}"] = array
    return Call(operator, runs[operator], arguments)


def _extra(subject: Subject, arrays: Arrays, operator: str) -> dict[str, Any]:
    """Return what an operator needs beyond the problem itself."""
    if operator in ("page_scores", "extend_bounds"):
        return {"bounds": subject.bounds(arrays.bounds())}
    if operator == "top_pages":
        rng = np.random.default_rng(arrays.mask.size)
        eligible = arrays.everyone()
        return {
            "scores": subject.floats(rng.integers(-3, 4, eligible.shape).astype(float), "float32"),
            "eligible": subject.ints(np.ascontiguousarray(eligible)),
        }
    if operator == "attend_ranked":
        return {**_extra(subject, arrays, "page_scores"), **_extra(subject, arrays, "attend")}
    if operator in ("merge", "reuse", "attend"):
        rng = np.random.default_rng(arrays.q.size)
        made = [
            HostState(
                np.asarray(rng.integers(-8, 9, arrays.q.shape) / 8.0),
                np.asarray(rng.integers(-8, 9, arrays.q.shape[:3]) / 2.0),
            )
            for _ in range(2)
        ]
        return {"fresh": subject.state(made[0]), "cached": subject.state(made[1])}
    return {}


def arrays_in(value: Any) -> dict[str, Array]:
    """Return the arrays inside a result or argument by name ("" for the array itself)."""
    if isinstance(value, AttentionState):
        return {".out": value.out, ".lse": value.lse}
    if isinstance(value, PageBounds):
        return {".lower": value.lower, ".upper": value.upper}
    if isinstance(value, RankedResult):
        parts = {
            "out": value.out,
            "state": value.state,
            "active": value.active,
            "selection": value.selection.mask,
            "kept": value.kept,
        }
        return {f".{part}{name}": array for part, held in parts.items() for name, array in arrays_in(held).items()}
    if isinstance(value, tuple):
        return {f"[{i}]{name}": array for i, part in enumerate(value) for name, array in arrays_in(part).items()}
    return {"": value} if is_array(value) else {}


def leaves(value: Any) -> dict[str, Host]:
    """Return what a policy remembers as copies on the host, by name."""
    return {name: host(part) if is_array(part) else np.asarray(part) for name, part in array_leaves(value).items()}


def array_leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return the arrays and numbers that a policy remembers, by name."""
    if is_array(value):
        return {name: value}
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, tuple):
        held = {str(number): part for number, part in enumerate(value)}
    else:
        return {} if value is None else {name: value}
    return {key: leaf for part in held for key, leaf in array_leaves(held[part], f"{name}.{part}").items()}
