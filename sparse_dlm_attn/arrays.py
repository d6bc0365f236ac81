"""The few array helpers that the array API standard leaves out.

An :data:`Array` is any object that `array-api-compat <https://data-apis.org/array-api-compat/>`_
recognises: NumPy, PyTorch, CuPy, JAX. Nothing here copies data between devices.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

__all__ = [
    "Array",
    "compute_dtype",
    "copy_of",
    "device_kind",
    "device_of",
    "dtype_name",
    "dtype_of_host",
    "invert_permutation",
    "is_array",
    "is_host",
    "is_readable",
    "namespace",
    "records_gradient",
    "shape_of",
    "strided_view",
    "strides_of",
    "to_numpy",
    "without_autocast",
]

Array: TypeAlias = Any
P = ParamSpec("P")
R = TypeVar("R")

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

_namespaces: dict[type, Any] = {}  # of array types met so far: a type has one namespace


def namespace(*arrays: Array) -> Any:
    """Return the array API namespace that all ``arrays`` share."""
    kind = type(arrays[0]) if arrays else None
    if kind in _namespaces and all(type(array) is kind for array in arrays):
        # Looked up in every operator; and torch.compile warns about the library's cached helpers.
        return _namespaces[kind]
    found = array_namespace(*arrays)
    if all(type(array) is kind for array in arrays):
        _namespaces[type(arrays[0])] = found
    return found


def is_array(value: object) -> bool:
    """Return whether ``value`` is an array of a known library."""
    return type(value) in _namespaces or bool(is_array_api_obj(value))


def device_of(array: Array) -> Any:
    """Return the device of ``array`` as its own library names it."""
    return array.device if hasattr(array, "detach") else device(array)  # PyTorch: no need to ask around


def device_kind(array: Array) -> str:
    """Return the kind of device, e.g. ``"cpu"`` or ``"cuda"``, without its number.

    Libraries spell the processor in their own ways ("cpu", "TFRT_CPU_0", "Device('CPU_DEVICE')").
    """
    name = str(device_of(array)).lower()
    return "cpu" if "cpu" in name else name.split(":")[0]


def is_host(array: Array) -> bool:
    """Return whether ``array`` lies in host memory."""
    if isinstance(array, np.ndarray):
        return True
    known = getattr(array, "is_cpu", None)  # of PyTorch, whose devices take long to spell
    return device_kind(array) == "cpu" if known is None else bool(known)


def is_readable(array: Array) -> bool:
    """Return whether values can be read now: without waiting for a device, and while no compiler traces."""
    torch = sys.modules.get("torch")
    return is_host(array) and not (torch is not None and torch.compiler.is_compiling())


def records_gradient(array: Array) -> bool:
    """Return whether PyTorch records what is computed from ``array``, for a derivative."""
    return bool(getattr(array, "requires_grad", False)) and sys.modules["torch"].is_grad_enabled()


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function multiply in the precision that it chooses, whatever ``torch.autocast`` says.

    Scores in half precision would change decisions as well as results.
    """

    @functools.wraps(function)
    def computed(*arguments: P.args, **options: P.kwargs) -> R:
        torch = sys.modules.get("torch")
        if torch is not None and torch._C._is_any_autocast_enabled():
            for device in AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    with torch.autocast(device, enabled=False):
                        return computed(*arguments, **options)
        return function(*arguments, **options)

    return computed


def dtype_name(array: Array) -> str:
    """Return the dtype without its library's prefix, e.g. ``"bfloat16"``."""
    return _spelled(array.dtype) if isinstance(array, np.ndarray) else _spell(array.dtype)


def _spell(dtype: Any) -> str:
    return str(dtype).rsplit(".", maxsplit=1)[-1]


_spelled = functools.cache(_spell)  # checks ask often, and NumPy takes microseconds to spell a dtype


def shape_of(array: Array) -> tuple[int, ...]:
    """Return the shape as plain integers."""
    return tuple(map(int, array.shape))


def compute_dtype(array: Array) -> Any:
    """Return the dtype in which scores and sums are computed (clause ACCURACY-1).

    float64 inputs compute in float64, every other floating dtype in float32.
    """
    xp = namespace(array)
    return xp.float64 if dtype_name(array) == "float64" else xp.float32


def copy_of(array: Array) -> Array:
    """Return a copy on the same device, whatever the library's default device is, without a gradient."""
    if hasattr(array, "detach"):  # PyTorch, which would copy that a gradient is wanted
        return array.detach().clone()
    return namespace(array).asarray(array, device=device_of(array), copy=True)


def strides_of(array: Array) -> tuple[int, ...] | None:
    """Return the strides in elements, or None where the library has none."""
    if isinstance(array, np.ndarray):
        return tuple(stride // array.itemsize for stride in array.strides)
    return tuple(array.stride()) if hasattr(array, "stride") else None


def strided_view(array: Array, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """Return a view of ``array`` from its first element on; strides in elements.

    The caller answers for its bounds. NumPy's is read-only, since its elements may overlap.
    """
    if isinstance(array, np.ndarray):
        return np.lib.stride_tricks.as_strided(
            array, shape, tuple(stride * array.itemsize for stride in strides), writeable=False
        )
    return array.as_strided(shape, strides)


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """Copy ``array`` to the host as NumPy; bfloat16 (unknown to NumPy) becomes float32."""
    if isinstance(array, np.ndarray):
        return array
    if dtype_name(array) == "bfloat16":
        xp = namespace(array)
        array = xp.astype(array, xp.float32)
    if hasattr(array, "detach"):  # PyTorch: off the graph and off the device first
        array = array.detach().cpu()
    return np.asarray(array)


def dtype_of_host(values: Any) -> str | None:
    """Return ``"float32"`` for Python's floats, None for values that have a dtype.

    PyTorch would take floats in its default dtype, which is a setting of the process.
    """
    if hasattr(values, "dtype") or np.asarray(values).dtype != np.float64:
        return None
    return "float32"


def invert_permutation(order: Array) -> Array:
    """Return the inverse of permutations along the last axis: ``inverse[order[i]] = i``."""
    xp = namespace(order)
    return xp.argsort(order, axis=-1, stable=True)
