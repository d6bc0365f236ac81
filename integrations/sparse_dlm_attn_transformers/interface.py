"""One name in both registries of transformers: attention functions, and the masks made for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary

import torch

from sparse_dlm_attn import CallOrderError
from sparse_dlm_attn_transformers.contracts import check_plain_softmax
from sparse_dlm_attn_transformers.masks import mask_function

if TYPE_CHECKING:
    from sparse_dlm_attn_transformers.session import SparseAttention

__all__ = ["NAME", "attention_function", "register", "sessions"]

NAME = "sparse_dlm_attn"
"""The ``attn_implementation`` that this package registers."""

sessions: WeakKeyDictionary[torch.nn.Module, ReferenceType[SparseAttention]] = WeakKeyDictionary()
"""The modules of every model that something is attached to; transformers calls us with a module alone."""


def register() -> None:
    """Register the attention and the mask function under `NAME`; doing it again changes nothing.

    `SparseAttention` does it. Importing this package does not, so that an import changes nothing elsewhere.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    # Without it transformers drops padding in silence.
    AttentionMaskInterface.register(NAME, mask_function)


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers asks an attention function to.

    Parameters
    ----------
    module : torch.nn.Module
        The attention module.
    query, key, value : torch.Tensor
        ``(batch, heads, tokens, head_dim)``.
    attention_mask : torch.Tensor or None
        As `mask_function` makes it.
    scaling : float, optional
        Softmax scale; default ``1 / sqrt(head_dim)``.
    **kwargs : object
        What else models pass on.

    Returns
    -------
    out : torch.Tensor
        ``(batch, tokens, heads, head_dim)``.
    weights : None
        Never computed.

    Raises
    ------
    CallOrderError
        If nothing is attached to the model.
    InvalidArgumentError
        If the model asks for something that changes scores.
    """
    reference = sessions.get(module)
    session = None if reference is None else reference()
    if session is None:
        raise CallOrderError(
            f"attn_implementation={NAME!r}",
            "must be set by attaching to the model",
            f"a {type(module).__name__} that nothing is attached to",
            "Use `with SparseAttention(model, policy=...):`, or set another attn_implementation.",
        )
    if not session.attends(module):  # prefill, vision: dense, by PyTorch
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    # Windows come with a mask that says which tokens they hold, and our attention is never causal.
    check_plain_softmax(kwargs, ("softcap", "s_aux", "position_bias", "is_causal", "head_mask"), module)
    out = session.attend(module, query, key, value, mask=attention_mask, scale=scaling)
    return out.transpose(1, 2), None
