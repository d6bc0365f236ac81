"""Attention masks of transformers: what we make, and what we read from those that a model hands us."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparse_dlm_attn import InvalidArgumentError, InvalidTypeError

__all__ = ["mask_function", "visible_context"]

HostArray = np.ndarray[Any, Any]


def mask_function(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Make masks as "sdpa" does: bool ``(batch, 1, queries, keys)``, or None where nothing is hidden.

    Without a registered mask function transformers makes no mask at all, and padding is attended to.
    """
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def visible_context(
    mask: object, batch: int, context_tokens: int, tokens: int
) -> HostArray:
    """Return which tokens of the context a block may read, bool ``(batch, context_tokens)``.

    Reads the mask on the host, so it waits for a device.

    Parameters
    ----------
    mask : torch.Tensor or None
        ``(batch, keys)`` of padding, 1 where a token is; or ``(batch, heads, queries, keys)``, bool or added
        to the scores. ``keys`` are those of the context and of the block behind it, or of the context alone.
        A str, as some models say "full", hides nothing.
    batch, context_tokens, tokens : int
        Sequences, tokens of the context, tokens of the block.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If rows of the block see different tokens of the context, if a token of the block does not see the
        whole block, or if the mask is no mask.
    """
    if mask is None or isinstance(mask, str):
        return np.ones((batch, context_tokens), dtype=bool)
    if not isinstance(mask, torch.Tensor):
        raise InvalidTypeError(
            "attention_mask", "must be a tensor or None", type(mask).__name__,
            "Pass a mask (batch, tokens) of padding.",
        )
    allowed = _allowed(mask)
    keys = int(mask.shape[-1])
    if mask.ndim == 2:
        allowed = allowed[:, None, None, :]
    if (
        mask.ndim not in (2, 4) or keys not in (context_tokens, context_tokens + tokens)
        or allowed.shape[0] not in (1, batch) or allowed.shape[2] not in (1, tokens)
    ):
        raise InvalidArgumentError(
            "attention_mask",
            f"must have shape ({batch}, {context_tokens + tokens}), or ({batch}, heads, {tokens}, "
            f"{context_tokens + tokens})", f"shape {tuple(mask.shape)}",
        )
    of_context, of_block = allowed[..., :context_tokens], allowed[..., context_tokens:]
    first = of_context[:, :1, :1]
    facts = torch.stack([(of_context == first).all(), of_block.all()]).cpu().tolist()
    if not facts[0]:
        raise InvalidArgumentError(
            "attention_mask", "must show all tokens of a block the same tokens of the context",
            "rows that differ", "Mask padding alone.",
        )
    if not facts[1]:
        raise InvalidArgumentError(
            "attention_mask", "must show the whole block to each of its tokens",
            "a mask that hides some of them", "Pass a block-causal mask, or padding alone, or None.",
        )
    host: HostArray = first[:, 0, 0].expand(batch, context_tokens).cpu().numpy()
    return host


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    """Turn a mask into bools; numbers are 0 and 1 for padding, or 0 and the lowest where they are added."""
    if mask.dtype == torch.bool:
        return mask
    if mask.ndim == 2:
        return mask != 0
    if not mask.dtype.is_floating_point:
        return mask != 0
    allowed, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min / 2
    if not bool((allowed | hidden).all()):
        raise InvalidArgumentError(
            "attention_mask", "must be bool, or 0 and the lowest number of its dtype",
            "other numbers, a bias", "Sparse attention adds no bias to scores.",
        )
    return allowed
