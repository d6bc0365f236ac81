"""Attention masks of transformers: what we make, and what we read from those that a model hands us."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparse_dlm_attn import InvalidArgumentError, InvalidTypeError

__all__ = ["mask_function", "visible_context", "visible_tokens"]

HostArray = np.ndarray[Any, Any]
HIDDEN = -1e4
"""An added number at or below this hides a key: `exp` of it is 0 in every dtype."""


def mask_function(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Make masks as "sdpa" does: bool ``(batch, 1, queries, keys)``, or None where nothing is hidden.

    Without a registered mask function transformers makes no mask at all, and padding is attended to.
    """
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def visible_context(
    mask: object, batch: int, context_tokens: int, tokens: int, *, room: int | None = None, of_module: bool = False
) -> HostArray:
    """Return which tokens of the context a block may read, bool ``(batch, context_tokens)``.

    Reads the mask on the host, so it waits for a device.

    Parameters
    ----------
    mask : torch.Tensor or None
        ``(batch, keys)`` of padding, ``(batch, queries, keys)`` or ``(batch, heads, queries, keys)``; the
        batch may be 1. True, or 1, where a key is seen; or numbers that are added to scores, 0 where it is.
        ``keys`` are those of the context and of the block behind it, or of the context alone; for ``room`` also
        slots of the cache, in which the block may lie or not. A str, as some models say "full", hides nothing.
    batch, context_tokens, tokens : int
        Sequences, tokens of the context, tokens of the block.
    room : int, optional
        Slots of a cache that stays where it is; default: as many as it holds tokens.
    of_module : bool
        Whether the mask is what a model hands to its attention modules: of two axes, ``(queries, keys)``.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If rows of the block see different tokens of the context, if a token of the block does not see the
        whole block, or if the mask is no mask.
    """
    if mask is None or isinstance(mask, str):
        return np.ones((batch, context_tokens), dtype=bool)
    # Where each form of mask has the block, by its number of keys.
    after = context_tokens + tokens
    forms = {context_tokens: slice(0, 0), after: slice(context_tokens, after)}
    if room is not None and room > context_tokens:
        forms[room + tokens] = slice(room, room + tokens)
        if room > after:
            forms[room] = slice(context_tokens, after)
    seen = _seen(mask, batch, tokens, (*forms, after), of_module)
    of_context, of_block = seen[..., :context_tokens], seen[..., forms[seen.shape[3]]]
    first = of_context[:, :1, :1]
    same, whole = torch.stack([(of_context == first).all(), of_block.all()]).cpu().tolist()
    if not same:
        raise InvalidArgumentError(
            "attention_mask",
            "must show all tokens of a block the same tokens of the context",
            f"{described(mask)}, whose rows differ",
            "Mask padding alone.",
        )
    if not whole:
        raise InvalidArgumentError(
            "attention_mask",
            "must show the whole block to each of its tokens",
            f"{described(mask)}, which hides some of them",
            "Pass a block-causal mask, or padding alone, or None; and the rows of one block of the model.",
        )
    host: HostArray = first[:, 0, 0].expand(batch, context_tokens).cpu().numpy()
    return host


def visible_tokens(mask: object, batch: int, tokens: int) -> HostArray:
    """Return which tokens of a whole sequence exist, bool ``(batch, tokens)``; as `visible_context` does.

    Rows of tokens that do not exist may see anything or nothing.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If a token that exists does not see all the others, or if the mask is no mask.
    """
    if mask is None or isinstance(mask, str):
        return np.ones((batch, tokens), dtype=bool)
    seen = _seen(mask, batch, tokens, (tokens,), False).expand(batch, -1, tokens, -1)
    exists = seen.any(dim=1).any(dim=1)
    wrong = exists[:, None, :, None] & (seen != exists[:, None, None, :])
    if bool(wrong.any()):
        raise InvalidArgumentError(
            "attention_mask",
            "must show every token to every other where the block is the whole sequence",
            f"{described(mask)}, which hides some from some",
            "Mask padding alone; a model that is causal from block to block needs a cache, scope='prefix'.",
        )
    host: HostArray = exists.cpu().numpy()
    return host


def described(mask: object) -> str:
    """Say which form of mask was seen."""
    if not isinstance(mask, torch.Tensor):
        return f"a {type(mask).__name__}"
    return f"a mask {tuple(mask.shape)} of {str(mask.dtype).removeprefix('torch.')}"


def _seen(mask: object, batch: int, tokens: int, key_counts: tuple[int, ...], of_module: bool) -> torch.Tensor:
    """Return a mask as bool ``(1 or batch, heads, 1 or tokens, keys)``."""
    if not isinstance(mask, torch.Tensor):
        raise InvalidTypeError(
            "attention_mask", "must be a tensor or None", type(mask).__name__, "Pass a mask (batch, tokens) of padding."
        )
    seen = _as_bool(mask)
    if mask.ndim == 2:
        seen = seen[None, None] if of_module else seen[:, None, None]
    elif mask.ndim == 3:
        seen = seen[:, None]
    fits = seen.ndim == 4 and seen.shape[0] in (1, batch) and seen.shape[2] in (1, tokens)
    if not fits or seen.shape[3] not in key_counts:
        keys = key_counts[-1]
        raise InvalidArgumentError(
            "attention_mask",
            f"must have shape ({batch}, {keys}), ({batch}, {tokens}, {keys}) or ({batch}, heads, {tokens}, {keys})",
            described(mask),
            "Pass the mask of these tokens and of the cache before them, or None.",
        )
    return seen


def _as_bool(mask: torch.Tensor) -> torch.Tensor:
    """Turn a mask into bools: True where a key is seen."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= HIDDEN if mask.dtype.is_floating_point else torch.zeros_like(mask, dtype=torch.bool)
    zeros, ones = mask == 0, mask == 1
    counts = torch.stack([part.sum() for part in (zeros, ones, hidden)]).cpu().tolist()
    if sum(counts) != mask.numel() or (counts[1] and counts[2]):
        raise InvalidArgumentError(
            "attention_mask",
            f"must be bool, or 0 and 1, or numbers to add: 0 and at most {HIDDEN:.0f}",
            f"{described(mask)} with other numbers, a bias",
            "Sparse attention adds no bias to scores.",
        )
    # Nothing but zeros: numbers that are added and hide nothing, or padding that hides everything.
    added = counts[2] > 0 or (counts[1] == 0 and mask.ndim > 2 and mask.dtype.is_floating_point)
    return zeros if added else ones
