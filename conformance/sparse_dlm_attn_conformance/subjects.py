"""What is under test: a backend and a dtype, with the conversions between it and the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparse_dlm_attn import (
    AttentionState,
    Backend,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PageBounds,
    Selection,
    UnavailableError,
    UnknownNameError,
    get_backend,
)
from sparse_dlm_attn.arrays import Array, device_of, is_array, namespace, to_numpy
from sparse_dlm_attn_conformance.cases import Arrays, Host, transport
from sparse_dlm_attn_conformance.guards import restored, time_limit
from sparse_dlm_attn_conformance.tables import HostState

DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A case's values as arrays of the backend under test."""

    q: Array
    q_other: Array
    k: Array
    v: Array
    context: Context
    selection: Selection
    active: Array

    def arrays(self) -> dict[str, Array]:
        """Return every array by name."""
        named = {name: getattr(self, name) for name in ("q", "q_other", "k", "v", "active")}
        tables = ("k_pages", "v_pages", "page_table", "page_lengths", "page_segments")
        named |= {name: getattr(self.context, name) for name in tables} | {"selection.mask": self.selection.mask}
        return {name: array for name, array in named.items() if array is not None}


@dataclass(eq=False)
class Subject:
    """A backend under test with one dtype.

    Parameters
    ----------
    spec : str
        How the backend was asked for.
    dtype : str
        Dtype of q, K and V; "any" if the backend did not load.
    instance : Backend or None
        The backend, None if it did not load.
    error : str
        Why it did not load.
    """

    spec: str
    dtype: str
    instance: Backend | None = None
    error: str = ""
    _device: Any = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"{self.spec}-{self.dtype}"

    @property
    def backend(self) -> Backend:
        """The backend; only for subjects that loaded."""
        if self.instance is None:
            raise RuntimeError(f"backend {self.spec!r} did not load: {self.error}")
        return self.instance

    @property
    def device(self) -> Any:
        """Device on which the backend makes its arrays, as its own library names it."""
        if self._device is None:
            self._device = device_of(self.ints(np.zeros((1,), dtype=np.int32)))
        return self._device

    @property
    def device_kind(self) -> str:
        """Kind of the device ("cpu", "cuda"), as `sparse_dlm_attn.capabilities.Problem` writes it."""
        return str(self.device).split(":")[0].lower()

    def using(self, backend: Backend) -> Subject:
        """Return the same subject with another backend object, for example one that watches calls."""
        return Subject(self.spec, self.dtype, backend)

    def floats(self, values: Host, dtype: str | None = None, *, gapped: bool = False) -> Array:
        """Convert host values to an array of this dtype (or of ``dtype``); ``gapped`` as for `ints`."""
        name = dtype or self.dtype
        if gapped:
            wide = np.full((*values.shape[:-1], 2 * values.shape[-1]), np.nan)
            wide[..., : values.shape[-1]] = values
            return frozen(self.floats(wide, name)[..., : values.shape[-1]])
        return frozen(self.backend.asarray(transport(values, name), dtype=name))

    def ints(self, values: Host, *, gapped: bool = False) -> Array:
        """Convert int8, int32 or bool host values, keeping their dtype.

        ``gapped`` cuts them out of a wider array, as an engine's table for the longest sequence is.
        """
        if gapped:
            wide = np.ones((*values.shape[:-1], values.shape[-1] + 3), dtype=values.dtype)
            wide[..., : values.shape[-1]] = values
            return frozen(self.ints(wide)[..., : values.shape[-1]])
        return frozen(self.backend.asarray(values, dtype=values.dtype.name))

    def state(self, state: HostState, layout: str = "plain") -> AttentionState:
        """Convert an attention state, in plain, token-major or gapped memory."""
        lse = self.floats(state.lse, "float32", gapped=layout == "gapped")
        return AttentionState(self.laid_out(state.out, layout), lse)

    def bounds(self, bounds: PageBounds, layout: str = "plain") -> PageBounds:
        """Convert page bounds, in plain, token-major (here page-major) or gapped memory."""
        return PageBounds(self.laid_out(bounds.lower, layout), self.laid_out(bounds.upper, layout))

    def load(self, arrays: Arrays) -> Loaded:
        """Convert a whole problem, in the memory layout that it asks for."""
        segments, gapped = arrays.page_segments, arrays.layout == "gapped"
        context = Context(
            self.laid_out(arrays.k_pages, arrays.layout),
            self.laid_out(arrays.v_pages, arrays.layout),
            self.ints(arrays.page_table, gapped=gapped),
            self.ints(arrays.page_lengths, gapped=gapped),
            None if segments is None else self.ints(segments, gapped=gapped),
        )
        rows = {name: self.laid_out(getattr(arrays, name), arrays.layout) for name in ("q", "q_other", "k", "v")}
        return Loaded(
            context=context,
            selection=Selection(self.ints(arrays.mask, gapped=gapped), arrays.span),
            active=self.ints(arrays.active, gapped=gapped),
            **rows,
        )

    def laid_out(self, values: Host, layout: str) -> Array:
        """Convert ``(a, heads, tokens, head_dim)`` values to plain, token-major or gapped memory."""
        if layout == "token_major":
            moved = self.floats(np.ascontiguousarray(values.swapaxes(1, 2)))
            return frozen(namespace(moved).permute_dims(moved, (0, 2, 1, 3)))
        if layout == "gapped":  # every other token of a cache twice as long; the gaps hold NaN
            wide = np.full((*values.shape[:2], 2 * values.shape[2], values.shape[3]), np.nan)
            wide[:, :, ::2] = values
            return frozen(self.floats(wide)[:, :, ::2, :])
        return self.floats(values)

    def owns(self, value: object) -> bool:
        """Return whether ``value`` is an array of this backend's library and device."""
        return (
            is_array(value)
            and type(value) is type(self.ints(np.zeros((1,), dtype=np.int32)))
            and str(device_of(value)) == str(self.device)
        )


def frozen(array: Array) -> Array:
    """Return ``array``, read-only if it is NumPy's, so that a write into it cannot go unnoticed."""
    if isinstance(array, np.ndarray):
        array = array[...]
        array.flags.writeable = False
    return array


def host(array: Array) -> Host:
    """Copy an array of any library to the host."""
    return np.array(to_numpy(array))


def load_backend(spec: str | Backend, *, seconds: float = 120.0, **options: Any) -> tuple[Backend | None, str]:
    """Return ``(backend, "")``, or ``(None, why)``, whatever foreign code does while it loads.

    A backend loads if it can be built and says what it supports, within ``seconds``. A request for what is
    not there at all raises its typed error.
    """
    try:
        with restored(), time_limit(seconds, f"loading {spec}"):
            backend = get_backend(spec, **options)
            declared = backend.capabilities
        unknown = [name for name in declared.dtypes if name not in DTYPES]
        if unknown or not declared.dtypes:
            return None, f"capabilities.dtypes must name some of {', '.join(DTYPES)}; got {declared.dtypes}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # foreign code may raise anything, SystemExit included
        if isinstance(spec, str) and names_nothing(spec, error):
            raise
        return None, f"{type(error).__name__}: {error}"
    return backend, ""


def names_nothing(text: str, error: BaseException) -> bool:
    """Return whether a request is wrong, rather than what it names: no such name, module or parameter."""
    if isinstance(error, UnavailableError):
        cause, module = error.__cause__, text.partition(":")[0]
        missing = isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}.")
        return missing or isinstance(cause, AttributeError)
    written = "=" in text or not isinstance(error, InvalidTypeError)
    return isinstance(error, UnknownNameError) or (isinstance(error, InvalidArgumentError) and written)
