"""What a transformers cache holds of one layer, as it lies in memory."""

from __future__ import annotations

from typing import Any

import torch

from sparse_dlm_attn import InvalidArgumentError

__all__ = ["cache_argument", "cached_layer", "check_viewable"]

READABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")
NAMES = ("cache", "past_key_values", "past_key_value")  # as versions of transformers call it
RULE = "must be a DynamicCache, whose layers are plain tensors that can be viewed as pages"
REMEDY = "Pass DynamicCache(config=model.config), or cache_implementation='dynamic' to generate()."


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


def _layers(cache: Any) -> Any:
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        raise InvalidArgumentError("cache", RULE, _described(cache), REMEDY)
    return layers


def _check_layer(layer: Any) -> None:
    if type(layer).__name__ not in READABLE:
        raise InvalidArgumentError("cache", RULE, _described(layer), REMEDY)


def _described(cache: Any) -> str:
    offloading = "an offloading " if getattr(cache, "offloading", False) else "a "
    return offloading + type(cache).__name__
