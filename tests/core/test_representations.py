"""How values are shown: by shape, dtype and device, without a look at what arrays hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sparse_dlm_attn
from sparse_dlm_attn import AttentionState, Context, PageBounds, PassInfo, PassInputs, PrefixAttention, Rule, Selection
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn.ranked import RankedPass, RankedResult
from sparse_dlm_attn.traffic import Traffic


class Closed(np.ndarray):
    """An array whose contents nobody may show."""

    def __repr__(self) -> str:
        raise AssertionError("the contents were read")

    __str__ = __format__ = tolist = item = __iter__ = __getitem__ = __repr__  # type: ignore[assignment]


def closed(shape: tuple[int, ...], dtype: str) -> Any:
    return np.zeros(shape, dtype).view(Closed)


def on_no_device(shape: tuple[int, ...], dtype: str) -> Any:
    torch = pytest.importorskip("torch", reason="PyTorch has tensors without contents")
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def values_of(make: Callable[[tuple[int, ...], str], Any]) -> list[Any]:
    """Return one value of each class, as a pass over 1024 tokens has them."""
    q, lse = make((1, 4, 16, 64), "float32"), make((1, 4, 16), "float32")
    pages, table = make((64, 2, 16, 64), "float32"), make((1, 64), "int32")
    bounds = PageBounds(make((1, 2, 64, 64), "float32"), make((1, 2, 64, 64), "float32"))
    context = Context(pages, pages, table, table, make((1, 64), "int8"), bounds)
    active, state = make((1, 16), "bool"), AttentionState(q, lse)
    selection = Selection(make((1, 2, 1, 64), "bool"), 16)
    info, ranked = PassInfo(3, decoded=active), RankedPass(256, 16, reference=q, count=5)
    attention = PrefixAttention("losa", "reference")
    inputs = PassInputs(attention.backend, q, context, None, state, info, False, kept=q)
    traffic = Traffic(selection, active, 4, 2, table, 512)
    memory = LayerMemory(
        attention.policy, 0, 0, 16, table, table, None, state, (q, q), bounds, selection, active, traffic
    )
    result = RankedResult(q, state, active, selection, q)
    rule = Rule(all_rows=active, reference=q)
    return [bounds, context, state, selection, info, ranked, inputs, traffic, memory, result, rule]


def test_every_public_value_with_arrays_is_tried_here() -> None:
    public = [getattr(sparse_dlm_attn, name) for name in sparse_dlm_attn.__all__]
    with_arrays = {
        each for each in public if isinstance(each, type) and dataclasses.is_dataclass(each)
        and any("Array" in str(field.type) for field in dataclasses.fields(each))
    }
    assert with_arrays <= {type(value) for value in values_of(lambda shape, dtype: np.zeros(shape, dtype))}


@pytest.mark.parametrize(("make", "device"), [(closed, "cpu"), (on_no_device, "meta")])
def test_a_value_is_shown_in_a_line_without_reading_its_arrays(
    make: Callable[[tuple[int, ...], str], Any], device: str
) -> None:
    for value in values_of(make):
        shown = repr(value)
        assert shown.startswith(f"{type(value).__name__}(") and "\n" not in shown
        assert len(shown) < 1000
        assert f"on {device}" in shown


def test_arrays_are_shown_by_dtype_shape_and_device_and_plain_values_as_they_are() -> None:
    shown = {type(value): repr(value) for value in values_of(closed)}
    state = "AttentionState(out=float32[1, 4, 16, 64] on cpu, lse=float32[1, 4, 16] on cpu)"
    assert shown[AttentionState] == state
    assert shown[Selection] == "Selection(mask=bool[1, 2, 1, 64] on cpu, span=16)"
    assert "index=3, is_save=False, decoded=bool[1, 16] on cpu, newly_decoded=None" in shown[PassInfo]
    assert f"state={state}" in shown[LayerMemory]
    assert "policy=Losa(budget=256, " in shown[LayerMemory]
    assert "traffic=Traffic(selection=Selection(...), " in shown[LayerMemory]
