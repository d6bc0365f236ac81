"""What every launch needs: sizes of tiles, programmatic dependent launch, tensors as kernels read them."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
import triton

from sparse_dlm_attn.errors import UnavailableError

__all__ = [
    "INTERPRETED", "bytes_of", "chained", "launched", "lined", "power_of_two", "precision", "shared_memory",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton interprets kernels on CPU tensors, as it decided when it was imported."""
OLDEST_GPU = 8, 0
"""Compute capability from which on there are asynchronous copies and bfloat16."""
Tensor = torch.Tensor


def power_of_two(number: int, least: int = 16) -> int:
    """Return the least power of two that holds ``number``, and ``least`` at the least."""
    return max(least, 1 << max(number - 1, 0).bit_length())


@functools.cache
def chained(device: torch.device) -> bool:
    """Return whether kernels may start while the previous one ends (programmatic dependent launch).

    Raises
    ------
    UnavailableError
        If the GPU is too old for the kernels. Not when a backend is made: to ask a GPU initialises CUDA, and
        processes cannot be forked any more.
    """
    if INTERPRETED:
        return False
    have = torch.cuda.get_device_capability(device)
    if have < OLDEST_GPU:
        raise UnavailableError(
            f"backend 'triton' on device {str(device)!r}",
            ["its compute capability is {}.{}, and kernels need {}.{}".format(*have, *OLDEST_GPU)],
            "Use another GPU, or backend 'torch' or 'reference'.",
        )
    return have >= (9, 0) and os.environ.get("SDA_TRITON_PDL", "1") != "0"


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program of the device may use; interpreted ones use none."""
    if INTERPRETED:
        return sys.maxsize
    number = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(number)["max_shared_mem"])


def launched(device: torch.device) -> dict[str, Any]:
    """Return what every chained launch passes."""
    return {"PDL": True, "launch_pdl": True} if chained(device) else {"PDL": False}


def precision(tensor: Tensor) -> str:
    """Return how products are multiplied: float32 must not be cut to tf32, or exact sums are none."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def bytes_of(mask: Tensor) -> Tensor:
    """View a bool tensor as int8, which kernels load; anything else stays."""
    return mask.view(torch.int8) if mask.dtype == torch.bool else mask


def lined(tensor: Tensor) -> Tensor:
    """Return a tensor whose last axis is contiguous, as kernels read it: itself wherever it is."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
