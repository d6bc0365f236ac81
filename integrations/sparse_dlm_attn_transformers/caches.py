"""What a transformers cache holds of one layer, as it lies in memory, and what becomes of its sequences."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from sparse_dlm_attn import InvalidArgumentError

__all__ = ["cache_argument", "cached_layer", "check_viewable", "follow_sequences"]

READABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")
NAMES = ("cache", "past_key_values", "past_key_value")  # as versions of transformers call it
RULE = "must be a DynamicCache, whose layers are plain tensors that can be viewed as pages"
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


def cached_layer(cache: Any, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return keys and values of one layer, ``(batch, kv_heads, tokens, head_dim)``; not a copy.

    Parameters
    ----------
    cache : Cache or None
        A cache of transformers.
    layer_idx : int
        Layer, as the cache counts.

    Returns
    -------
    tuple of torch.Tensor or None
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
    return keys, values


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
            change = torch.arange(first[0].shape[0] // int(change)).repeat_interleave(int(change))
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
    if type(layer).__name__ not in READABLE and not isinstance(layer, types.SimpleNamespace):
        raise InvalidArgumentError("cache", RULE, _described(layer), REMEDY)


def _described(cache: Any) -> str:
    offloading = "an offloading " if getattr(cache, "offloading", False) else "a "
    return offloading + type(cache).__name__
