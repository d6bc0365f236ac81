"""What every launch needs: sizes of tiles, programmatic dependent launch (PDL), tensors as kernels read them."""

from __future__ import annotations

import functools
import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
import triton

from sparse_dlm_attn.errors import UnavailableError

__all__ = [
    "INTERPRETED",
    "LOG2_E",
    "WIDE_TILE_BYTES",
    "Launch",
    "aligned",
    "bytes_of",
    "last_contiguous",
    "layout",
    "power_of_two",
    "precision",
    "shared_memory",
    "uses_pdl",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton interprets kernels on CPU tensors, as it decided when it was imported."""
OLDEST_GPU = 8, 0
"""First compute capability with asynchronous copies and bfloat16."""
LOG2_E = 1.4426950408889634
WIDE_TILE_BYTES = 136 << 10
"""Shared memory that the widest tiles need; GPUs with 99 KiB take narrower ones."""
Tensor = torch.Tensor


def power_of_two(number: int, least: int = 16) -> int:
    """Return the next power of two, but at least ``least``: 16 is the smallest side of a tensor-core product."""
    return max(least, 1 << max(number - 1, 0).bit_length())


@functools.cache
def uses_pdl(device: torch.device) -> bool:
    """Return whether kernels start while the previous one ends (programmatic dependent launch).

    Raises
    ------
    UnavailableError
        If the GPU is too old for the kernels. Asked for at the first launch, not when a backend is made: the
        question initialises CUDA, after which a process cannot fork.
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
    """Return the bytes of shared memory that a CTA may use; unlimited under the interpreter."""
    if INTERPRETED:
        return sys.maxsize
    number = triton.runtime.driver.active.get_current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(number)["max_shared_mem"])


class Launch:
    """A kernel with its grid, numbers and constants: everything but the tensors of a launch.

    The first launch goes through Triton's binder, which specialises and compiles; later ones call the compiled
    kernel directly, which saves most of the host's time. That needs tensors on 16-byte boundaries (``aligned``),
    as the kernel was compiled for them; other launches go through the binder each time.

    A kernel's parameters are tensors, then ``numbers`` and tuples of strides, then compile-time constants.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *numbers: Any,
        device: torch.device,
        aligned: bool = True,
        **constants: Any,
    ) -> None:
        # It may start while the kernel before it ends, where the GPU can.
        constants |= {"PDL": True, "launch_pdl": True} if uses_pdl(device) else {"PDL": False}
        self._kernel, self._numbers, self._constants = kernel, numbers, constants
        self._grid = grid + (1,) * (3 - len(grid))
        self._device, self._aligned = device if device.type == "cuda" else None, aligned
        self._run: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        if self._run is None:
            self._bind(tensors)
        elif self._device is None or torch.cuda.current_device() == self._device.index:
            self._run(*tensors, *self._rest)
        else:
            with torch.cuda.device(self._device):
                self._run(*tensors, *self._rest)

    def _bind(self, tensors: tuple[Tensor, ...]) -> None:
        """Launch by way of Triton's own binder, and keep what it compiled if that serves again."""
        with torch.cuda.device(self._device) if self._device is not None else nullcontext():
            given = [bytes_of(tensor) for tensor in tensors]
            compiled = self._kernel[self._grid](*given, *self._numbers, **self._constants)
        if compiled is None or not self._aligned:
            return
        names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
        self._rest = (*self._numbers, *(self._constants[name] for name in names))
        self._run = compiled[self._grid]


def layout(tensor: Tensor) -> tuple[Any, Any]:
    """Return the shape and strides of a tensor, which decide how it is read."""
    return tensor.shape, tensor.stride()


def aligned(*tensors: Tensor) -> bool:
    """Return whether all tensors begin at multiples of 16 bytes."""
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses & 15 == 0


def precision(dtype: torch.dtype) -> str:
    """Return the input precision of products: float32 must not be cut to tf32, or exact sums are not exact."""
    return "ieee" if dtype == torch.float32 else "tf32"


def bytes_of(mask: Tensor) -> Tensor:
    """View a bool tensor as int8, which kernels load; anything else stays."""
    return mask.view(torch.int8) if mask.dtype == torch.bool else mask


def last_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
