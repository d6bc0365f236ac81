"""Nested values as a skeleton and the tensors in it: graphs are keyed by the one and fed with the other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

__all__ = ["copy_tensors", "filled", "map_tensors", "skeleton", "tensors_of"]

Skipped = tuple[str, ...]


def _parts(value: Any, skipped: Skipped) -> list[tuple[Any, Any]] | None:
    """Return names and values of what a value holds, None for a leaf."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value) if field.name not in skipped]
    return None


def skeleton(value: Any, skipped: Skipped = ()) -> Hashable:
    """Return all of a value but the contents of its tensors, and but the skipped fields of dataclasses.

    What cannot be hashed counts as itself: the caller keeps it alive.
    """
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    parts = _parts(value, skipped)
    if parts is not None:
        return type(value), tuple((name, skeleton(part, skipped)) for name, part in parts)
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


def tensors_of(value: Any, skipped: Skipped = ()) -> Iterator[torch.Tensor]:
    """Yield the tensors of a value, in the order of its skeleton."""
    if isinstance(value, torch.Tensor):
        yield value
    for _, part in _parts(value, skipped) or ():
        yield from tensors_of(part, skipped)


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any, skipped: Skipped = ()) -> Any:
    """Return a value with ``function`` of each tensor in its place."""
    if isinstance(value, torch.Tensor):
        return function(value)
    parts = _parts(value, skipped)
    if parts is None:
        return value
    changed = {name: map_tensors(function, part, skipped) for name, part in parts}
    if isinstance(value, dict):  # outputs of transformers are dicts of a class of their own
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, list | tuple):
        items = list(changed.values())
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    copy = object.__new__(type(value))  # valid already, and frozen
    for field in fields(value):
        object.__setattr__(copy, field.name, changed.get(field.name, getattr(value, field.name)))
    return copy


def filled(value: Any, tensors: Sequence[torch.Tensor], skipped: Skipped = ()) -> Any:
    """Return a value with other tensors in it."""
    following = iter(tensors)
    return map_tensors(lambda _: next(following), value, skipped)


def copy_tensors(into: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    """Copy what is not there already, in a few launches."""
    groups: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, tensor in zip(into, tensors, strict=True):
        if target is not tensor and target.numel():
            targets, sources = groups.setdefault((target.dtype, tensor.dtype, tensor.device), ([], []))
            targets.append(target)
            sources.append(tensor)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources)
