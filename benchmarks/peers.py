"""Other people's kernels on the same tensors: dense attention of a block over its context, with LSE."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from layer import Layer, Shape

__all__ = ["dense_peers"]


def _folded(layer: Layer, shape: Shape) -> torch.Tensor:
    """Fold the group into the rows of the queries: ``(batch, kv_heads, group * tokens, head_dim)``."""
    return layer.q_next.reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)


def _sdpa_flash(layer: Layer, shape: Shape) -> Callable[[], Any]:
    q, (k, v) = _folded(layer, shape), layer.cache
    return lambda: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _sdpa_cudnn(layer: Layer, shape: Shape) -> Callable[[], Any]:
    q, (k, v) = _folded(layer, shape), layer.cache
    return lambda: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]


def _flash_attn_3(layer: Layer, shape: Shape) -> Callable[[], Any]:
    try:
        function = importlib.import_module("flash_attn_interface").flash_attn_func
    except ImportError:
        function = importlib.import_module("fa3_fwd_interface").flash_attn_func  # as a wheel of its own
    q, k, v = (side.transpose(1, 2) for side in (layer.q_next, *layer.cache))
    splits = 16 if shape.batch == 1 else 0

    def run() -> Any:
        out, lse = function(q, k, v, num_splits=splits, pack_gqa=True, return_attn_probs=True)[:2]
        return out.transpose(1, 2), lse

    return run


def _flex(layer: Layer, shape: Shape, folded: bool = True) -> Callable[[], Any]:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(module.flex_attention, dynamic=False)
    q, (k, v) = _folded(layer, shape) if folded else layer.q_next, layer.cache
    request = getattr(module, "AuxRequest", None)
    options: dict[str, Any] = {"return_lse": True} if request is None else {"return_aux": request(lse=True)}
    options["enable_gqa"] = not folded

    def run() -> Any:
        out, aux = compiled(q, k, v, **options)
        return out, getattr(aux, "lse", aux)

    return run


DENSE = {
    "SDPA flash, group folded": _sdpa_flash,
    "SDPA cuDNN": _sdpa_cudnn,
    "flash-attn 3": _flash_attn_3,
    "FlexAttention, group folded": _flex,
    "FlexAttention, enable_gqa": functools.partial(_flex, folded=False),
}


def dense_peers(
    layers: list[Layer], shape: Shape, names: tuple[str, ...]
) -> dict[str, list[Callable[[], Any]] | str]:
    """Return for each peer its work on every layer, or in words why it is not there.

    Parameters
    ----------
    layers : list of Layer
        Inputs.
    shape : Shape
        Their sizes.
    names : tuple of str
        Peers to ask, keys of `DENSE`.
    """
    found: dict[str, list[Callable[[], Any]] | str] = {}
    for name in names:
        try:
            works = [DENSE[name](layer, shape) for layer in layers]
            works[0]()
            found[name] = works
        except Exception as error:  # whatever a missing or unfit library raises
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return found
