"""Values that policies and backends exchange: frozen, validated by shape and dtype.

Constructing one never reads array contents, so it never synchronises with a device.
Shapes are logical; strides are free, except that the last axis is contiguous.
"""

from __future__ import annotations

import math
import operator
import reprlib
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Real
from typing import Any, TypeVar

import numpy as np

from sparse_dlm_attn.arrays import Array, device_of, dtype_name, is_array, is_readable, namespace, shape_of, to_numpy
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.forms import once_a_form, with_one_form

__all__ = [
    "AttentionState",
    "PageBounds",
    "changed",
    "check_array",
    "check_int",
    "check_same_place",
    "check_sequences",
    "short_repr",
    "softmax_scale",
    "take_sequences",
]

T = TypeVar("T")

FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_array(name: str, value: Array, axes: tuple[int | str, ...], dtypes: tuple[str, ...] = FLOATS) -> None:
    """Raise unless ``value`` is an array of the given axes and dtypes.

    Parameters
    ----------
    name : str
        Argument name for the message.
    value : object
        What the caller gave.
    axes : tuple of int or str
        One entry an axis: an int is the required size, a str names a free size.
    dtypes : tuple of str
        Accepted dtype names.

    Raises
    ------
    InvalidTypeError
        If it is not an array or has another dtype.
    InvalidArgumentError
        If the number of axes or a fixed size differs.
    """
    if not is_array(value):
        raise InvalidTypeError(
            name,
            f"must be an array of shape {_written(axes)}",
            type(value).__name__,
            "Convert it with the backend's asarray().",
        )
    shape = shape_of(value)
    if len(shape) != len(axes) or any(
        isinstance(axis, int) and axis != size for axis, size in zip(axes, shape, strict=False)
    ):
        raise InvalidArgumentError(name, f"must have shape {_written(axes)}", f"shape {shape}")
    if dtype_name(value) not in dtypes:
        raise InvalidTypeError(name, f"must have dtype {' or '.join(dtypes)}", f"dtype {dtype_name(value)}")


def _written(axes: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(map(str, axes)) + ")"


def check_int(name: str, value: object, minimum: int | None = None) -> int:
    """Return ``value`` as an int; NumPy's integers count as such, bools do not.

    Raises
    ------
    InvalidTypeError
        If it is not an integer.
    InvalidArgumentError
        If it is less than ``minimum``.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise InvalidTypeError(name, "must be an int", repr(value))
    if minimum is not None and value < minimum:
        raise InvalidArgumentError(name, f"must be at least {minimum}", value)
    # `operator.index` would turn a number that a compiler keeps symbolic into a constant.
    return value if type(value) is int else operator.index(value)


def check_same_place(name: str, value: Array, like_name: str, like: Array) -> None:
    """Raise unless two arrays are of one library and lie on one device."""
    if device_of(value) != device_of(like) or namespace(value) is not namespace(like):
        raise InvalidArgumentError(
            name,
            f"must be a {type(like).__name__} on device {device_of(like)}, as {like_name} is",
            f"a {type(value).__name__} on {device_of(value)}",
        )


def check_sequences(indices: Any, batch: int, like: Array) -> Array:
    """Return the numbers of sequences as int64 ``(sequences,)`` beside ``like``.

    Raises
    ------
    InvalidTypeError
        If they are no integers.
    InvalidArgumentError
        If they are no list, or name a sequence that is not there (where they can be read).
    """
    rule = f"must be a list or array of sequence numbers in 0..{batch - 1}"
    if isinstance(indices, list | tuple):
        if any(isinstance(index, bool) or not isinstance(index, int | np.integer) for index in indices):
            raise InvalidTypeError("indices", rule, repr(indices))
        indices = np.asarray(indices, dtype=np.int64)
    check_array("indices", indices, ("sequences",), ("int8", "int16", "int32", "int64"))
    if is_readable(indices):
        host = to_numpy(indices)
        if ((host < 0) | (host >= batch)).any():
            raise InvalidArgumentError("indices", rule, host.tolist())
    xp = namespace(like)
    return xp.astype(xp.asarray(indices, device=device_of(like)), xp.int64)


def take_sequences(value: Any, indices: Array) -> Any:
    """Return ``value`` for other sequences: every array in it, taken along its first axis.

    Parameters
    ----------
    value : object
        An array ``(batch, ...)``, or dataclasses and tuples of them. Numbers, names, None and arrays without
        axes hold for all sequences.
    indices : array
        int64 ``(sequences,)``.

    Raises
    ------
    InvalidTypeError
        If it holds something else.
    """
    if is_array(value):
        return namespace(value).take(value, indices, axis=0) if value.ndim else value
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: take_sequences(getattr(value, name), indices) for name in names})
    if isinstance(value, tuple):
        parts = [take_sequences(part, indices) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or isinstance(value, str | Real):
        return value
    raise InvalidTypeError(
        "memory",
        "must hold arrays (batch, ...), numbers, names, dataclasses or tuples to be reordered",
        type(value).__name__,
        "Give the policy a reorder() of its own.",
    )


def softmax_scale(head_dim: int, scale: float | None) -> float:
    """Return ``scale``, or the default ``1 / sqrt(head_dim)``: the only place it is defined."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    rule = "must be a finite positive number or None"
    given: object = scale  # whatever its annotation promises
    if isinstance(given, bool | np.bool_) or not isinstance(given, Real):
        raise InvalidTypeError("scale", rule, repr(given))
    try:
        number = float(given)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not math.isfinite(number) or number <= 0:
        raise InvalidArgumentError("scale", rule, number)
    return number


def changed(value: T, **parts: Any) -> T:
    """Return a copy of a frozen value with other parts, which need no check."""
    copy = object.__new__(type(value))
    vars(copy).update(vars(value), **parts)
    return copy


class _ShortRepr(reprlib.Repr):
    """Shows an array by dtype, shape and device, and what is unknown or lies too deep by its type."""

    repr_bytes = reprlib.Repr.repr_str

    def repr_instance(self, x: Any, level: int) -> str:
        """Show a value for whose type there is no other method."""
        name = type(x).__name__
        if is_array(x):
            return f"{dtype_name(x)}{list(shape_of(x))} on {device_of(x)}"
        if is_dataclass(x):
            if level <= 0:
                return f"{name}(...)"
            shown = (f"{each.name}={self.repr1(getattr(x, each.name), level - 1)}" for each in fields(x) if each.repr)
            return f"{name}({', '.join(shown)})"
        return repr(x) if x is None or isinstance(x, bool | int | float) else f"<{name}>"


_SHORT_REPR = _ShortRepr()
_SHORT_REPR.maxlevel, _SHORT_REPR.maxtuple, _SHORT_REPR.maxstring = 2, 4, 60


def short_repr(value: object) -> str:
    """Return how a value that holds arrays is shown; reads no array, so it never waits for a device.

    Parameters
    ----------
    value : object
        A dataclass, which takes this function for its ``__repr__``.

    Examples
    --------
    >>> from sparse_dlm_attn import Selection
    >>> import numpy as np
    >>> Selection(np.ones((1, 2, 1, 64), dtype=bool), 16)
    Selection(mask=bool[1, 2, 1, 64] on cpu, span=16)
    """
    return _SHORT_REPR.repr(value)


@once_a_form
def _check_state(out: Array, lse: Array) -> None:
    check_array("out", out, ("batch", "q_heads", "tokens", "head_dim"))
    check_array("lse", lse, shape_of(out)[:3], ("float32",))
    check_same_place("lse", lse, "out", out)


@dataclass(frozen=True, eq=False)
class AttentionState:
    """Softmax attention over one set of keys, in a form that can be merged (clause STATE-1).

    Parameters
    ----------
    out : array
        ``(batch, q_heads, tokens, head_dim)``, normalised output in the dtype of the inputs.
    lse : array
        float32 ``(batch, q_heads, tokens)``, natural log of the sum of ``exp(scale * q . k)``.
        An empty key set has ``out = 0`` and ``lse = -inf``.
    """

    out: Array
    lse: Array

    __repr__ = short_repr

    def __post_init__(self) -> None:
        _check_state(self.out, self.lse)

    @classmethod
    def empty_like(cls, q: Array) -> AttentionState:
        """Return the state of the empty key set for queries shaped like ``q``."""
        check_array("q", q, ("batch", "q_heads", "tokens", "head_dim"))
        xp = namespace(q)
        lse = xp.full(shape_of(q)[:3], -math.inf, dtype=xp.float32, device=q.device)
        return cls(xp.zeros_like(q), lse)


@with_one_form
@dataclass(frozen=True, eq=False)
class PageBounds:
    """Per-channel bounds of the valid keys of each page (QUEST metadata, clause BOUNDS-1).

    Parameters
    ----------
    lower, upper : array
        ``(batch, kv_heads, pages, head_dim)``, in the dtype of the keys (a minimum or maximum of
        keys is a key's value, so nothing is rounded). Both are 0 for a page without tokens.
    """

    lower: Array
    upper: Array

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_array("lower", self.lower, ("batch", "kv_heads", "pages", "head_dim"))
        check_array("upper", self.upper, shape_of(self.lower), (dtype_name(self.lower),))
        check_same_place("upper", self.upper, "lower", self.lower)
