"""The block's dense part: two matrix products, or flash-attn where it is asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from sparse_dlm_attn import UnavailableError
from sparse_dlm_attn.arrays import compute_dtype

__all__ = ["attend_dense", "attend_flash", "flash_attention"]

ROWS_AT_ONCE = 1024  # bounds the score matrix of a whole-sequence block
FLASH_MODULES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn.cute", "flash_attn")
"""Where flash-attn 3, its wheel of the forward pass alone, 4 and 2 put ``flash_attn_func``."""


def attend_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend without a mask (clause BLOCK-1).

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    k, v : torch.Tensor
        ``(batch, kv_heads, keys, head_dim)``.
    scale : float
        Factor on q.k.

    Returns
    -------
    tuple of torch.Tensor
        ``out`` like ``q`` and float32 ``lse`` ``(batch, q_heads, tokens)``.
    """
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, dtype = k.shape[1], compute_dtype(q)
    rows = q.to(dtype).reshape(batch, kv_heads, q_heads // kv_heads * tokens, head_dim) * scale
    keys, values = k.to(dtype).transpose(-1, -2), v.to(dtype)
    outs, lses = [], []
    for part in torch.split(rows, ROWS_AT_ONCE, dim=2):
        logits = part @ keys
        lse = logits.logsumexp(dim=-1)
        out = torch.softmax(logits, dim=-1) @ values
        # Keys whose scores are all -inf weigh nothing, as an empty set (STATE-2).
        outs.append(out.masked_fill(lse.isneginf()[..., None], 0.0))
        lses.append(lse)
    out = torch.cat(outs, dim=2).reshape(q.shape).to(q.dtype)
    return out, torch.cat(lses, dim=2).reshape(batch, q_heads, tokens).to(torch.float32)


def flash_attention() -> tuple[str, Callable[..., Any]]:
    """Return the name of the flash-attn module that imports here and its ``flash_attn_func``.

    Raises
    ------
    UnavailableError
        If none does.
    """
    reasons = []
    for name in FLASH_MODULES:
        try:
            return name, importlib.import_module(name).flash_attn_func
        except (ImportError, AttributeError, OSError, RuntimeError) as error:  # built for another CUDA, too
            reasons.append(f"{name}: {error}")
    raise UnavailableError(
        "backend 'torch' with dense='flash'",
        reasons,
        "Install flash-attn for your GPU and PyTorch (pip install flash-attn), or pass dense='matmul'.",
    )


def attend_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend without a mask through flash-attn; arguments and results as `attend_dense`.

    Parameters
    ----------
    q, k, v : torch.Tensor
        float16 or bfloat16 on a CUDA device.
    scale : float
        Factor on q.k.
    """
    if 0 in k.shape or 0 in q.shape:
        return attend_dense(q, k, v, scale)
    name, function = flash_attention()
    options: dict[str, Any] = {"softmax_scale": scale, "causal": False}
    for switch in ("return_attn_probs", "return_lse"):  # versions 2 and 3, version 4
        if switch in inspect.signature(function).parameters:
            options[switch] = True
    result = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
    if not isinstance(result, tuple) or len(result) < 2 or result[1] is None:
        raise UnavailableError(
            f"backend 'torch' with dense='flash' ({name})",
            ["this version returns no log-sum-exp"],
            "Upgrade it: pip install -U flash-attn, or pass dense='matmul'.",
        )
    out, lse = result[:2]
    return out.transpose(1, 2).contiguous(), lse.to(torch.float32).contiguous()
