"""The reference backend: NumPy, float64 inside, loops where they read like the specification.

It defines what is correct. It shares no arithmetic with the default operators of
`sparse_dlm_attn.Backend` nor with any other backend, so agreement with it means something.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from sparse_dlm_attn import AttentionState, Backend, Context, InvalidTypeError, PageBounds, Selection
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn_reference import attention, decisions

__all__ = ["ReferenceBackend"]

FloatArray = np.ndarray[Any, Any]
DTYPES = ("float32", "float64", "float16")


class ReferenceBackend(Backend):
    """Every operator of the specification, in NumPy and float64."""

    name: ClassVar[str] = "reference"

    @property
    def capabilities(self) -> Capabilities:
        """Any shape; float16 to float64; host memory."""
        return Capabilities(
            dtypes=DTYPES,
            devices=("cpu",),
            deterministic=True,
            batch_invariant=True,
            notes="NumPy, float64 inside; defines what is correct, not what is fast.",
        )

    def asarray(self, values: Any, *, dtype: str | None = None) -> FloatArray:
        """Convert host values to NumPy."""
        if dtype is not None and str(dtype) not in (*DTYPES, "int8", "int32", "int64", "bool"):
            raise InvalidTypeError(
                "dtype",
                f"must be one of {', '.join(DTYPES)}, an integer dtype or bool",
                repr(dtype),
                "NumPy has no bfloat16.",
            )
        try:
            array = np.asarray(values, dtype=dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidTypeError(
                "values", f"must be numbers that fit dtype {dtype or 'of their own'}", repr(values)[:80]
            ) from error
        if array.dtype.kind not in "biuf":
            raise InvalidTypeError("values", "must be bools or real numbers", f"dtype {array.dtype}")
        return array

    def page_bounds(self, context: Context) -> PageBounds:
        return decisions.page_bounds(context)

    def page_scores(self, q: FloatArray, bounds: PageBounds, *, active: FloatArray | None = None) -> FloatArray:
        return decisions.page_scores(q, bounds, active)

    def pooled_scores(
        self, q: FloatArray, context: Context, *, span: int, scale: float | None = None, lse: FloatArray | None = None
    ) -> FloatArray:
        return decisions.pooled_scores(q, context, span=span, scale=scale, lse=lse)

    def top_pages(self, scores: FloatArray, count: int | FloatArray, *, eligible: FloatArray) -> FloatArray:
        return decisions.top_pages(scores, count, eligible)

    def query_change(self, q: FloatArray, q_reference: FloatArray) -> FloatArray:
        return decisions.query_change(q, q_reference)

    def largest_changes(self, change: FloatArray, *, count: int | None = None, mass: float | None = None) -> FloatArray:
        return decisions.largest_changes(change, count=count, mass=mass)

    def attend_pages(
        self, q: FloatArray, context: Context, selection: Selection, active: FloatArray, *, scale: float | None = None
    ) -> AttentionState:
        return attention.attend_pages(q, context, selection, active, scale=scale)

    def attend_block(
        self, q: FloatArray, k: FloatArray, v: FloatArray, *, scale: float | None = None
    ) -> AttentionState:
        return attention.attend_block(q, k, v, scale=scale)

    def merge(self, *states: AttentionState) -> AttentionState:
        return attention.merge(*states)

    def reuse(self, active: FloatArray, fresh: AttentionState, cached: AttentionState) -> AttentionState:
        return attention.reuse(active, fresh, cached)
