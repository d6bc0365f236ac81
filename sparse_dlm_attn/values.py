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
from typing import Any, ClassVar, TypeVar

import numpy as np

from sparse_dlm_attn.arrays import (
    Array,
    device_of,
    dtype_name,
    is_array,
    is_readable,
    namespace,
    shape_of,
    to_numpy,
)
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.forms import once_a_form, with_one_form

__all__ = [
    "AttentionState",
    "PageBounds",
    "PassInfo",
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

PER_PASS = ("index", "is_save", "window_index", "decoded", "newly_decoded", "window", "planned")
FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64")


def check_array(
    name: str, value: Array, axes: tuple[int | str, ...], dtypes: tuple[str, ...] = FLOATS
) -> None:
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
            name, f"must be an array of shape {_written(axes)}", type(value).__name__,
            "Convert it with the backend's asarray().",
        )
    shape = shape_of(value)
    if len(shape) != len(axes) or any(
        isinstance(axis, int) and axis != size for axis, size in zip(axes, shape, strict=False)
    ):
        raise InvalidArgumentError(name, f"must have shape {_written(axes)}", f"shape {shape}")
    if dtype_name(value) not in dtypes:
        raise InvalidTypeError(
            name, f"must have dtype {' or '.join(dtypes)}", f"dtype {dtype_name(value)}"
        )


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
            name, f"must be a {type(like).__name__} on device {device_of(like)}, as {like_name} is",
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
        "memory", "must hold arrays (batch, ...), numbers, names, dataclasses or tuples to be reordered",
        type(value).__name__, "Give the policy a reorder() of its own.",
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
            shown = (f"{each.name}={self.repr1(getattr(x, each.name), level - 1)}"
                     for each in fields(x) if each.repr)
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


@dataclass(frozen=True, eq=False)
class PassInfo:
    """Where a pass stands in the denoising of its block.

    Parameters
    ----------
    index : int or array
        Pass within the block, 0 for the first. An int holds for every sequence and lets policies
        skip work on the host; an integer array ``(batch,)`` serves sequences at different passes.
    is_save : bool or array
        Whether this is the save pass (writes the block's final KV); bool array ``(batch,)`` likewise.
    decoded, newly_decoded : array, optional
        bool ``(batch, tokens)``: tokens that are no longer masked, and those of them that were
        unmasked after the previous pass. Policies that need them say so when they are missing.
    layer, num_layers : int
        Layer of this call, counted from 0, and the model's number of layers.
    total_passes : int, optional
        Denoising passes planned for the block (save pass not counted); None if not known.
    window : array, optional
        bool ``(batch, tokens)``: the rows that are being filled in, where a block is decoded part by part;
        None for all of them.
    window_index : int or array, optional
        Pass within the window, as ``index`` within the block; None if the block is one window.
    planned : array, optional
        bool ``(batch, tokens)``: rows that are decoded after this pass, where that is known before it.
    planned_order : array, optional
        Integers ``(batch, rows)``: the rows of ``planned`` in the order in which they are decoded, each once,
        and -1 behind the last of a sequence that has fewer than others. None: from left to right.
    """

    index: int | Array
    is_save: bool | Array = False
    decoded: Array | None = None
    newly_decoded: Array | None = None
    layer: int = 0
    num_layers: int = 1
    total_passes: int | None = None
    window: Array | None = None
    window_index: int | Array | None = None
    planned: Array | None = None
    planned_order: Array | None = None
    arrays: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that hold an array for each sequence or each row."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", _pass_number("index", self.index))
        object.__setattr__(self, "is_save", _host_uniform("is_save", self.is_save))
        if self.window_index is not None:
            object.__setattr__(self, "window_index", _pass_number("window_index", self.window_index))
        if not isinstance(self.is_save, bool):
            check_array("is_save", self.is_save, ("batch",), ("bool", "bool_"))
        for name in ("decoded", "newly_decoded", "window", "planned"):
            if getattr(self, name) is not None:
                check_array(name, getattr(self, name), ("batch", "tokens"), ("bool", "bool_"))
        if self.planned_order is not None:
            _check_order(self.planned_order, self.planned)
        for name in ("layer", "num_layers", "total_passes"):
            if name != "total_passes" or self.total_passes is not None:
                object.__setattr__(self, name, check_int(name, getattr(self, name)))
        arrays = (name for name in PER_PASS if not isinstance(getattr(self, name), bool | int | None))
        object.__setattr__(self, "arrays", tuple(arrays))
        if self.num_layers < 1:
            raise InvalidArgumentError("num_layers", "must be at least 1", self.num_layers)
        if not 0 <= self.layer < self.num_layers:
            raise InvalidArgumentError(
                "layer", f"must be in 0..num_layers-1 = 0..{self.num_layers - 1}", self.layer
            )
        if self.total_passes is not None and self.total_passes < 1:
            raise InvalidArgumentError("total_passes", "must be at least 1 or None", self.total_passes)

    def check_fits(self, q: Array) -> None:
        """Raise unless arrays are of the sequences and rows of queries ``(batch, q_heads, tokens, head_dim)``."""
        for name in self.arrays:
            shape = shape_of(q)[::2][: 1 if name in PER_PASS[:3] else 2]
            if shape_of(getattr(self, name)) != shape:
                axes = "(batch,)" if len(shape) == 1 else "(batch, tokens)"
                raise InvalidArgumentError(
                    f"info.{name}", f"must have shape {axes} = {shape}", shape_of(getattr(self, name))
                )

    @property
    def pass_in_window(self) -> int | Array:
        """``window_index``, or ``index`` where the block is one window."""
        return self.index if self.window_index is None else self.window_index

    def at_layer(self, layer: int) -> PassInfo:
        """Return the same pass in another layer."""
        if not 0 <= check_int("layer", layer) < self.num_layers:
            raise InvalidArgumentError("layer", f"must be less than the model's {self.num_layers} layers", layer)
        return changed(self, layer=layer)

    def of_sequences(self, name: str, like: Array) -> Array:
        """Return ``index``, ``window_index`` or ``is_save`` as an array ``(batch,)`` beside ``like``."""
        xp = namespace(like)
        value: Any = self.pass_in_window if name == "window_index" else getattr(self, name)
        dtype = xp.bool if name == "is_save" else xp.int32
        if isinstance(value, bool | int):
            return xp.full((like.shape[0],), value, dtype=dtype, device=like.device)
        return xp.astype(xp.asarray(value, device=like.device), dtype)


def _pass_number(name: str, value: Any) -> Any:
    """Return a pass number, or an array ``(batch,)`` of them; raise for anything else."""
    value = _host_uniform(name, value)
    if isinstance(value, int):
        if isinstance(value, bool) or not 0 <= value < 2**31:
            raise InvalidArgumentError(name, "must be a pass number from 0 to 2**31 - 1", value)
        return value
    check_array(name, value, ("batch",), INTEGERS)
    if is_readable(value) and (to_numpy(value) < 0).any():
        raise InvalidArgumentError(name, "must hold pass numbers from 0", to_numpy(value).tolist())
    return value


def _check_order(order: Any, planned: Array | None) -> None:
    """Raise unless ``order`` names every planned row once; rows are read on the host alone."""
    rule = "must name every row of planned once, with -1 behind the last of a sequence"
    if planned is None:
        raise InvalidArgumentError("planned_order", rule, "no planned", "Pass planned too.")
    batch, tokens = shape_of(planned)
    check_array("planned_order", order, (batch, "rows"), INTEGERS)
    if not (is_readable(order) and is_readable(planned)):
        return
    listed = to_numpy(order)
    rows = np.where((listed >= 0) & (listed < tokens), listed, tokens)  # the last column counts all others
    named = np.zeros((batch, tokens + 1), dtype=np.int64)
    np.add.at(named, (np.arange(batch)[:, None], rows), 1)
    strange = (listed < -1) | (listed >= tokens)
    strange[:, 1:] |= (listed[:, 1:] >= 0) & (listed[:, :-1] < 0)
    if strange.any() or (named[:, :tokens] != to_numpy(planned)).any():
        raise InvalidArgumentError("planned_order", rule, listed.tolist())


def _host_uniform(name: str, value: Any) -> Any:
    """Turn a host array (or sequence) whose entries agree into one Python scalar."""
    rule = f"must be {'a bool' if name == 'is_save' else 'an int'} or an array (batch,) of them"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int):
        return value
    if isinstance(value, list | tuple):
        try:
            value = np.asarray(value)
        except ValueError as error:  # a ragged list
            raise InvalidTypeError(name, rule, repr(value)) from error
    if not is_array(value):
        raise InvalidTypeError(name, rule, repr(value))
    if is_readable(value) and value.ndim == 1 and value.shape[0] > 0:
        host = to_numpy(value)
        if host.dtype.kind in "biu" and (host == host[0]).all():
            return bool(host[0]) if host.dtype == bool else int(host[0])
    return value
