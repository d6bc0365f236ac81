"""Where a pass stands in the denoising of its block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparse_dlm_attn.arrays import Array, is_array, is_readable, namespace, shape_of, to_numpy
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.values import changed, check_array, check_int, short_repr

__all__ = ["PassInfo"]

PER_PASS = ("index", "is_save", "window_index", "decoded", "newly_decoded", "window", "planned")
INTEGERS = ("int8", "int16", "int32", "int64")


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
            raise InvalidArgumentError("layer", f"must be in 0..num_layers-1 = 0..{self.num_layers - 1}", self.layer)
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
