"""What backends on tensors of PyTorch have in common: arrays from host values, and where they lie; imports PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from sparse_dlm_attn.array_backend import ArrayBackend
from sparse_dlm_attn.arrays import compute_dtype, dtype_of_host
from sparse_dlm_attn.checks import check_library
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["TorchTensors", "bound_scores"]

DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int32", "int64", "bool")


class TorchTensors(ArrayBackend):
    """A backend on ``torch.Tensor`` that computes on one device.

    Attributes
    ----------
    device : str
        Where it computes, and where `asarray` puts tensors: "cpu", "cuda" (any GPU) or "cuda:1" (that one).
    """

    device: str = "cuda"

    def asarray(self, values: Any, *, dtype: str | None = None) -> torch.Tensor:
        """Convert host values to tensors (a copy, so that the caller's array stays untouched)."""
        if dtype is not None and str(dtype) not in DTYPES:
            raise InvalidTypeError("dtype", f"must be one of {', '.join(DTYPES)}", repr(dtype))
        try:
            dtype = dtype or dtype_of_host(values)
            kind = getattr(torch, str(dtype)) if dtype is not None else None
            if isinstance(values, torch.Tensor):
                return values.detach().to(device=self.device, dtype=kind, copy=True)
            return torch.tensor(values, dtype=kind, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                raise  # the device failed earlier; the values are not to blame
            raise InvalidTypeError(
                "values", f"must be numbers that fit dtype {dtype or 'of their own'}", repr(values)[:80]
            ) from error

    def _check_place(self, name: str, tensor: torch.Tensor) -> None:
        """Raise unless a tensor is PyTorch's and lies on this backend's device."""
        check_library(name, tensor, torch.Tensor, self.name)
        kind, _, number = self.device.partition(":")
        place = tensor.device
        if place.type != kind or (number and place.index != int(number)):
            raise InvalidArgumentError(
                name,
                f"must be on device {self.device!r}, as this backend is",
                f"one on {place}",
                f"Move it: tensor.to({self.device!r}), or make the backend with device={str(place)!r}.",
            )


def bound_scores(q: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Return page scores by two products a KV head, ``relu(q) . upper + min(q, 0) . lower`` (clause SCORES-1).

    Parameters
    ----------
    q : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)``.
    lower, upper : torch.Tensor
        ``(batch, kv_heads, pages, head_dim)``.

    Returns
    -------
    torch.Tensor
        float32 ``(batch, q_heads, tokens, pages)``.
    """
    (batch, q_heads, tokens, head_dim), (_, kv_heads, pages, _), kind = q.shape, lower.shape, compute_dtype(q)
    rows = q.to(kind).reshape(batch, kv_heads, q_heads // kv_heads * tokens, head_dim)
    high, low = (bound.to(kind).transpose(-1, -2) for bound in (upper, lower))
    scores = rows.clamp(min=0) @ high + rows.clamp(max=0) @ low
    return scores.reshape(batch, q_heads, tokens, pages).to(torch.float32)
