"""What a transformers cache holds of one layer, as it lies in memory, and what becomes of its sequences."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn_transformers.paged_cache import PagedLayer

__all__ = ["CachedLayer", "cache_argument", "cached_layer", "check_viewable", "follow_sequences"]

READABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")
NAMES = ("cache", "past_key_values", "past_key_value")  # as versions of transformers call it
RULE = (
    "must be a DynamicCache, a PagedCache, or a StaticCache of transformers 5 without sliding layers: those can be "
    "viewed as pages"
)
REMEDY = "Pass DynamicCache(config=model.config), or cache_implementation='dynamic' to generate()."
SELECTING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


def cache_argument(arguments: dict[str, Any]) -> Any:
    """Return the cache among a call's arguments, whatever it is called there; None if there is none."""
    for name in NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def check_viewable(cache: Any) -> None:
    """Raise `InvalidArgumentError` if a cache of transformers cannot be read as pages in place; None can."""
    if cache is not None:
        for layer in _layers(cache):
            _check_layer(layer)


@dataclass(frozen=True, eq=False)
class CachedLayer:
    """Keys and values of one layer, as they lie in memory.

    Parameters
    ----------
    keys, values : torch.Tensor
        ``(batch, kv_heads, room, head_dim)``.
    held : int or torch.Tensor
        Tokens that they hold, from the first slot on; where a cache counts on the device, it is there.
    stays : bool
        Whether they stay where they are while tokens are added.
    """

    keys: torch.Tensor
    values: torch.Tensor
    held: int | torch.Tensor
    stays: bool

    def __repr__(self) -> str:
        held = f", {self.held} tokens held" if self.stays and isinstance(self.held, int) else ""
        return f"{tuple(self.keys.shape)}{held}"

    def moved_to(self, other: CachedLayer) -> bool:
        """Return whether another one lies elsewhere or holds more; what is counted on a device is not compared."""
        counted = isinstance(self.held, int) and self.held != other.held
        return (
            counted
            or self.keys.shape != other.keys.shape
            or (self.keys.numel() > 0 and self.keys.data_ptr() != other.keys.data_ptr())
        )


def cached_layer(cache: Any, layer_idx: int) -> CachedLayer | None:
    """Return keys and values of one layer; not a copy.

    Parameters
    ----------
    cache : Cache or None
        A cache of transformers.
    layer_idx : int
        Layer, as the cache counts.

    Returns
    -------
    CachedLayer or None
        None if it holds no token.

    Raises
    ------
    InvalidArgumentError
        If it cannot be read as pages in place.
    """
    if cache is None:
        return None
    layers = _layers(cache)
    if layer_idx >= len(layers):
        return None
    layer = layers[layer_idx]
    _check_layer(layer)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.numel() == 0:
        return None
    if isinstance(layer, PagedLayer):
        return CachedLayer(keys, values, layer.tokens, True) if layer.tokens else None
    if type(layer).__name__ == "StaticLayer":
        return CachedLayer(keys, values, layer.cumulative_length, True)
    return CachedLayer(keys, values, int(keys.shape[2]), False)


def follow_sequences(cache: Any, moved: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Call ``moved(indices)`` after a cache has changed which sequences it holds; return what undoes it.

    ``indices`` say, for each sequence that the cache holds now, which of those before it was.
    """
    for name in SELECTING:
        if hasattr(cache, name):
            vars(cache)[name] = _Following(cache, name, moved)

    def undo() -> None:
        for name in SELECTING:
            if isinstance(vars(cache).get(name), _Following):
                del vars(cache)[name]

    return undo


class _Following:
    """A cache's method that tells us what it did to the batch."""

    def __init__(self, cache: Any, name: str, moved: Callable[[torch.Tensor], None]) -> None:
        self._cache, self._name, self._moved = weakref.ref(cache), name, moved

    def __call__(self, change: Any, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        assert cache is not None  # it holds us
        result = getattr(type(cache), self._name)(cache, change, *args, **kwargs)
        if self._name == "batch_repeat_interleave":
            first = cached_layer(cache, 0)
            if first is None:
                return result
            change = torch.arange(first.keys.shape[0] // int(change)).repeat_interleave(int(change))
        self._moved(torch.as_tensor(change))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the plain method of the cache's copy, which nobody follows."""
        copy = memo[id(self._cache())]
        return types.MethodType(getattr(type(copy), self._name), copy)


def _layers(cache: Any) -> Any:
    layers = getattr(cache, "layers", None)
    if layers is None and type(cache).__name__ == "DynamicCache":  # transformers before 4.54
        pairs = zip(cache.key_cache, cache.value_cache, strict=True)
        return [types.SimpleNamespace(keys=keys, values=values) for keys, values in pairs]
    if layers is None or getattr(cache, "offloading", False):
        raise InvalidArgumentError("cache", RULE, _described(cache), REMEDY)
    return layers


def _check_layer(layer: Any) -> None:
    name = type(layer).__name__
    readable = name in READABLE or isinstance(layer, types.SimpleNamespace | PagedLayer)
    if not readable and not (name == "StaticLayer" and hasattr(layer, "cumulative_length")):
        raise InvalidArgumentError("cache", RULE, _described(layer), REMEDY)


def _described(cache: Any) -> str:
    offloading = "an offloading " if getattr(cache, "offloading", False) else "a "
    return offloading + type(cache).__name__
