"""What a transformers cache holds of one layer, as it lies in memory."""

from __future__ import annotations

from typing import Any

import torch

from sparse_dlm_attn import InvalidArgumentError

__all__ = ["cache_argument", "cached_layer"]

READABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")
NAMES = ("cache", "past_key_values", "past_key_value")  # as versions of transformers call it


def cache_argument(arguments: dict[str, Any]) -> Any:
    """Return the cache among a call's arguments, whatever it is called there; None if there is none."""
    for name in NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


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
    rule = "must be a DynamicCache, whose layers are plain tensors that can be viewed as pages"
    remedy = "Leave cache_implementation out, or pass DynamicCache(config=model.config)."
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        raise InvalidArgumentError("cache", rule, _described(cache), remedy)
    if layer_idx >= len(layers):
        return None
    layer = layers[layer_idx]
    if type(layer).__name__ not in READABLE:
        raise InvalidArgumentError("cache", rule, _described(layer), remedy)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.numel() == 0:
        return None
    return keys, values


def _described(cache: Any) -> str:
    offloading = "an offloading " if getattr(cache, "offloading", False) else "a "
    return offloading + type(cache).__name__
