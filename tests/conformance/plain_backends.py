"""Backends of four plain functions, which inherit every default operator: they prove the defaults."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from sparse_dlm_attn import AttentionState, Backend, PageBounds
from sparse_dlm_attn.arrays import compute_dtype, namespace, shape_of
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn.operators import gather_pages, valid_tokens
from sparse_dlm_attn.values import softmax_scale
from sparse_dlm_attn_reference import ReferenceBackend


class DefaultOperators(Backend):
    """The reference's four functions and the inherited defaults, on NumPy."""

    name: ClassVar[str] = "default-operators"

    def __init__(self) -> None:
        self.reference = ReferenceBackend()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("float32", "float64", "float16"), batch_invariant=False)

    def asarray(self, values: Any, *, dtype: str | None = None) -> Any:
        return self.reference.asarray(values, dtype=dtype)

    def page_bounds(self, context: Any) -> PageBounds:
        return self.reference.page_bounds(context)

    def page_scores(self, q: Any, bounds: PageBounds, *, active: Any = None) -> Any:
        return self.reference.page_scores(q, bounds)

    def attend_pages(
        self, q: Any, context: Any, selection: Any, active: Any, *, scale: float | None = None
    ) -> AttentionState:
        return self.reference.attend_pages(q, context, selection, active, scale=scale)

    def attend_block(self, q: Any, k: Any, v: Any, *, scale: float | None = None) -> AttentionState:
        return self.reference.attend_block(q, k, v, scale=scale)


class PlainArrayApi(Backend):
    """Four functions on the array API; a subclass says what an array is."""

    def page_bounds(self, context: Any) -> PageBounds:
        xp = namespace(context.k_pages)
        keys = gather_pages(context.k_pages, context)
        valid = valid_tokens(context)[:, None, :, :, None]
        absent = ~context.exists[:, None, :, None]
        sides = []
        for bound, filler in ((xp.min, math.inf), (xp.max, -math.inf)):
            filled = xp.where(valid, keys, xp.full_like(keys, filler))
            best = bound(filled, axis=3)
            sides.append(xp.where(absent, xp.zeros_like(best), best))
        return PageBounds(*sides)

    def page_scores(self, q: Any, bounds: PageBounds, *, active: Any = None) -> Any:
        xp, dtype = namespace(q), compute_dtype(q)
        group = q.shape[1] // bounds.lower.shape[1]
        rows = xp.astype(q, dtype)[:, :, :, None, :]
        low, high = (
            xp.repeat(xp.astype(part, dtype), group, axis=1)[:, :, None, :, :]
            for part in (bounds.lower, bounds.upper)
        )
        return xp.astype(xp.sum(xp.maximum(rows * low, rows * high), axis=-1), xp.float32)

    def attend_pages(
        self, q: Any, context: Any, selection: Any, active: Any, *, scale: float | None = None
    ) -> AttentionState:
        xp = namespace(q)
        batch, q_heads, tokens, head_dim = shape_of(q)
        count = context.pages * context.page_size
        rows = selection.for_rows(q_heads, tokens) & active[:, None, :, None]
        slots = rows[..., None] & valid_tokens(context)[:, None, None, :, :]
        allowed = xp.reshape(slots, (batch, q_heads, tokens, count))
        loaded = selection.loaded(active, q_heads, context.kv_heads)[..., None, None]
        parts = []
        for pages in (context.k_pages, context.v_pages):
            gathered = gather_pages(pages, context)
            gathered = xp.where(loaded, gathered, xp.zeros_like(gathered))  # others are not read
            parts.append(xp.reshape(gathered, (batch, context.kv_heads, count, head_dim)))
        clean = xp.where(active[:, None, :, None], q, xp.zeros_like(q))
        return masked_softmax(clean, parts[0], parts[1], allowed, softmax_scale(head_dim, scale))

    def attend_block(self, q: Any, k: Any, v: Any, *, scale: float | None = None) -> AttentionState:
        xp = namespace(q)
        allowed = xp.ones((*shape_of(q)[:3], k.shape[2]), dtype=xp.bool, device=q.device)
        return masked_softmax(q, k, v, allowed, softmax_scale(int(q.shape[3]), scale))


def masked_softmax(q: Any, k: Any, v: Any, allowed: Any, scale: float) -> AttentionState:
    xp, dtype = namespace(q), compute_dtype(q)
    group = q.shape[1] // k.shape[1]
    keys, values = (xp.repeat(xp.astype(part, dtype), group, axis=1) for part in (k, v))
    if keys.shape[2] == 0:
        return AttentionState.empty_like(q)
    logits = xp.matmul(xp.astype(q, dtype), xp.matrix_transpose(keys)) * scale
    logits = xp.where(allowed, logits, xp.full_like(logits, -math.inf))
    peak = xp.max(logits, axis=-1, keepdims=True)
    weights = xp.exp(logits - xp.where(peak == -math.inf, xp.zeros_like(peak), peak))
    total = xp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    safe = xp.where(empty, xp.ones_like(total), total)
    out = xp.matmul(weights, values) / safe
    lse = xp.where(empty, xp.full_like(total, -math.inf), peak + xp.log(safe))
    return AttentionState(xp.astype(out, q.dtype), xp.astype(lse[..., 0], xp.float32))


class TorchOperators(PlainArrayApi):
    """Four plain functions on PyTorch CPU tensors."""

    name: ClassVar[str] = "plain-torch"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("float32", "float64", "float16", "bfloat16"))

    def asarray(self, values: Any, *, dtype: str | None = None) -> Any:
        import torch

        host = np.array(values)
        tensor = torch.from_numpy(host) if host.ndim else torch.tensor(host.item())
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))


class StrictOperators(PlainArrayApi):
    """The same on array_api_strict, which accepts nothing but the standard."""

    name: ClassVar[str] = "plain-strict"

    @property
    def capabilities(self) -> Capabilities:
        places = ("array_api_strict.device('cpu_device')", "cpu")
        return Capabilities(dtypes=("float32", "float64"), devices=places)

    def asarray(self, values: Any, *, dtype: str | None = None) -> Any:
        import array_api_strict

        host = np.array(values)
        return array_api_strict.asarray(host if dtype is None else host.astype(dtype))
