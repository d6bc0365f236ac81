"""Backends of four plain functions, which inherit every default operator: they prove the defaults."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from sparse_dlm_attn import ArrayBackend, AttentionState, Backend, Selection
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn_reference import ReferenceBackend


class DefaultOperators(Backend):
    """The reference's four functions and the inherited defaults, on NumPy."""

    name: ClassVar[str] = "default-operators"
    capabilities = Capabilities(dtypes=("float32", "float64", "float16"), batch_invariant=False)
    asarray = ReferenceBackend.asarray
    page_bounds = ReferenceBackend.page_bounds
    page_scores = ReferenceBackend.page_scores
    attend_pages = ReferenceBackend.attend_pages
    attend_block = ReferenceBackend.attend_block


class SplitKeys(ReferenceBackend):
    """The reference, its attention in two parts that the library's own `merge` joins, as kernels split keys."""

    name: ClassVar[str] = "split-keys"

    def attend_pages(
        self, q: Any, context: Any, selection: Any, active: Any, *, scale: float | None = None
    ) -> AttentionState:
        first = np.arange(context.pages) < context.pages // 2
        masks = (selection.mask & first, selection.mask & ~first)
        parts = [Selection(mask, selection.span) for mask in masks]
        return Backend.merge(
            self, *(super(SplitKeys, self).attend_pages(q, context, part, active, scale=scale) for part in parts)
        )

    def attend_block(self, q: Any, k: Any, v: Any, *, scale: float | None = None) -> AttentionState:
        cut = (k.shape[2] + 1) // 2
        parts = [(k[:, :, :cut], v[:, :, :cut]), (k[:, :, cut:], v[:, :, cut:])]
        states = [super(SplitKeys, self).attend_block(q, *part, scale=scale) for part in parts if part[0].shape[2]]
        return Backend.merge(self, *states)


class TorchOperators(ArrayBackend):
    """The array backend on PyTorch CPU tensors."""

    name: ClassVar[str] = "plain-torch"

    capabilities = Capabilities(dtypes=("float32", "float64", "float16", "bfloat16"))

    def asarray(self, values: Any, *, dtype: str | None = None) -> Any:
        import torch

        host = np.array(values)
        tensor = torch.from_numpy(host) if host.ndim else torch.tensor(host.item())
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))


class StrictOperators(ArrayBackend):
    """The same on array_api_strict, which accepts nothing but the standard."""

    name: ClassVar[str] = "plain-strict"

    capabilities = Capabilities(dtypes=("float32", "float64"), devices=("array_api_strict.device('cpu_device')", "cpu"))

    def asarray(self, values: Any, *, dtype: str | None = None) -> Any:
        import array_api_strict

        host = np.array(values)
        return array_api_strict.asarray(host if dtype is None else host.astype(dtype))
