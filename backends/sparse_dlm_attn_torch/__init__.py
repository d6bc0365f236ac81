"""The PyTorch backend: plain tensor operations that read only what was selected.

It computes on the CPU today; GPU paths (FlexAttention, flash-attn) are not part of it yet, and it
refuses CUDA tensors instead of running something untested.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sparse_dlm_attn import (
    AttentionState,
    Backend,
    Capabilities,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PageBounds,
    Selection,
    UnavailableError,
)

try:
    import torch
except ImportError as error:
    raise UnavailableError(
        "backend 'torch'", [str(error)], "Install it: pip install 'sparse_dlm_attn[torch]'."
    ) from error

from sparse_dlm_attn_torch import gather, metadata

__all__ = ["TorchBackend"]

DTYPES = ("float32", "float64", "bfloat16", "float16")
OLDEST = (2, 5)


class TorchBackend(Backend):
    """The operators on ``torch.Tensor``.

    Parameters
    ----------
    device : str
        Where `asarray` puts tensors: "cpu".
    """

    name: ClassVar[str] = "torch"

    def __init__(self, device: str = "cpu") -> None:
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < OLDEST:
            raise UnavailableError(
                "backend 'torch'", [f"PyTorch {torch.__version__} is older than 2.5"],
                "Upgrade it: pip install -U torch.",
            )
        if device != "cpu":
            raise InvalidArgumentError(
                "device", "must be 'cpu'", repr(device), "GPU paths are not part of this backend yet."
            )
        self.device = device

    @property
    def capabilities(self) -> Capabilities:
        """Any shape; half, single and double precision; CPU."""
        return Capabilities(
            dtypes=DTYPES, devices=("cpu",), deterministic=True, batch_invariant=False,
            notes="Gathers the selected pages and multiplies; float32 or float64 inside.",
        )

    def asarray(self, values: Any, *, dtype: str | None = None) -> torch.Tensor:
        """Convert host values to tensors (a copy, so that the caller's array stays untouched)."""
        if dtype is not None and str(dtype) not in (*DTYPES, "int8", "int32", "int64", "bool"):
            raise InvalidTypeError(
                "dtype", f"must be one of {', '.join(DTYPES)}, an integer dtype or bool", repr(dtype)
            )
        kind = getattr(torch, dtype) if dtype is not None else None
        try:
            return torch.tensor(values, dtype=kind, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidTypeError(
                "values", f"must be numbers that fit dtype {dtype or 'of their own'}", repr(values)[:80]
            ) from error

    def page_bounds(self, context: Context) -> PageBounds:
        return metadata.page_bounds(context)

    def page_scores(
        self, q: torch.Tensor, bounds: PageBounds, *, active: torch.Tensor | None = None
    ) -> torch.Tensor:
        return metadata.page_scores(q, bounds, active)

    def attend_pages(
        self,
        q: torch.Tensor,
        context: Context,
        selection: Selection,
        active: torch.Tensor,
        *,
        scale: float | None = None,
    ) -> AttentionState:
        return gather.attend_pages(q, context, selection, active, scale=scale)

    def attend_block(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
    ) -> AttentionState:
        return gather.attend_block(q, k, v, scale=scale)
