"""Laws of the driver on the arrays of a backend: what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import (
    InvalidArgumentError,
    PassInfo,
    PrefixAttention,
    Selection,
    SparseAttentionError,
    StaleMemoryError,
    UnknownNameError,
    get_policy,
)
from sparse_dlm_attn_conformance.cases import Arrays, Case
from sparse_dlm_attn_conformance.checks import expect, expect_same_bits
from sparse_dlm_attn_conformance.doubles import Watched
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Loaded, Subject, host

Arguments = dict[str, Any]


def arguments_of(on: Loaded) -> Arguments:
    return {"q": on.q, "k": on.k, "v": on.v, "context": on.context, "memory": None, "info": PassInfo(0)}


def bad_inputs(subject: Subject, arrays: Arrays, on: Loaded) -> dict[str, tuple[str, Callable[[], Arguments]]]:
    """Return, by name, the argument that is wrong and a way to make the call."""
    other = "float32" if subject.dtype == "float64" else "float64"

    def swapped(**changes: Any) -> Callable[[], Arguments]:
        return lambda: {**arguments_of(on), **changes}

    def context(**changes: Any) -> Callable[[], Arguments]:
        return lambda: {**arguments_of(on), "context": replace(on.context, **changes)}

    narrow = arrays.q[..., :-1] if arrays.q.shape[3] > 1 else np.repeat(arrays.q, 2, axis=3)
    rows = (arrays.q.shape[0], arrays.q.shape[2] + 1)
    too_long = subject.ints(np.full(arrays.page_lengths.shape, arrays.page_size + 1, np.int32))
    negative = subject.ints(np.full(arrays.page_lengths.shape, -1, np.int32))
    outside = subject.ints(np.full(arrays.page_table.shape, arrays.k_pages.shape[0], np.int32))
    whole = subject.ints(np.full(arrays.page_lengths.shape, arrays.page_size, np.int32))
    return {
        "q is no array": ("q", swapped(q="queries")),
        "q is a list": ("q", swapped(q=arrays.q.tolist())),
        "q has three axes": ("q", swapped(q=subject.floats(arrays.q[0]))),
        "the block has no rows": (
            "q",
            swapped(**{name: subject.floats(getattr(arrays, name)[:, :, :0]) for name in "qkv"}),
        ),
        "q has another head_dim": ("k", swapped(q=subject.floats(narrow))),
        "k has another dtype": ("k", swapped(k=np.asarray(arrays.k, dtype=other))),
        "k has other heads": ("k", swapped(k=subject.floats(np.repeat(arrays.k, 2, axis=1)))),
        "v has other tokens": ("v", swapped(v=subject.floats(np.repeat(arrays.v, 2, axis=2)))),
        "context is no Context": ("context", swapped(context=(on.k, on.v))),
        "scale is 0": ("scale", swapped(scale=0.0)),
        "scale is NaN": ("scale", swapped(scale=float("nan"))),
        "scale is negative": ("scale", swapped(scale=-1.0)),
        "info is no PassInfo": ("info", swapped(info=3)),
        "memory is foreign": ("memory", swapped(memory=object(), info=PassInfo(1))),
        "newly_decoded has other rows": (
            "newly_decoded",
            lambda: {**arguments_of(on), "info": PassInfo(0, newly_decoded=subject.ints(np.zeros(rows, bool)))},
        ),
        "pass indices of another batch": (
            "index",
            lambda: {**arguments_of(on), "info": PassInfo(subject.ints(np.arange(rows[0] + 1, dtype=np.int32)))},
        ),
        "pass index is negative": ("index", lambda: {**arguments_of(on), "info": PassInfo(-1)}),
        "layer outside": ("layer", lambda: {**arguments_of(on), "info": PassInfo(0, layer=2, num_layers=2)}),
        "page longer than page_size": ("page_lengths", context(page_lengths=too_long)),
        "page of negative length": ("page_lengths", context(page_lengths=negative)),
        "page outside the pool": ("page_table", context(page_table=outside, page_lengths=whole)),
        "page_table of another dtype": (
            "page_table",
            context(page_table=subject.backend.asarray(arrays.page_table.astype(np.int8), dtype="int8")),
        ),
        "v_pages of another shape": ("v_pages", context(v_pages=subject.floats(np.repeat(arrays.v_pages, 2, axis=2)))),
        "selection of span 0": ("span", lambda: {"selection": Selection(on.selection.mask, 0)}),
    }


@pytest.mark.clause("ERROR-1", "DRIVER-1")
@law(case=cases(max_batch=2, min_pages=1, poisons=("zero",)), share=0.2)
def test_bad_input_raises_a_typed_error_and_changes_nothing(subject: Subject, arrays: Arrays) -> None:
    on, watched = subject.load(arrays), Watched(subject.backend)
    attention = PrefixAttention("dense", watched, check_contents=True)  # of tables on a device, too
    before = {name: host(array) for name, array in on.arrays().items()}
    for name, (argument, make) in bad_inputs(subject, arrays, on).items():
        try:
            made = make()
            scale = made.pop("scale", None)
            attention(made["q"], made["k"], made["v"], made["context"], made["memory"], made["info"], scale=scale)
        except SparseAttentionError as error:
            text = str(error)
            expect(argument in text, "ERROR-1", f"{name}: the error must name {argument}; got {text}")
            if isinstance(error, InvalidArgumentError):
                told = f"{name}: the error must give argument, rule and value; got {text}"
                expect(error.argument and error.rule and str(error.got), "ERROR-1", told)
        except Exception as error:
            expect(False, "ERROR-1", f"{name}: must raise an error of ours; got {type(error).__name__}: {error}")
        else:
            expect(False, "ERROR-1", f"{name}: must be refused")
        expect(watched.calls == [], "DRIVER-1", f"{name}: operators ran before the refusal: {watched.calls}")
    for name, array in on.arrays().items():
        expect_same_bits(host(array), before[name], f"argument {name} after refusals", "DRIVER-1")


@pytest.mark.clause("MEMORY-2", "DRIVER-1")
@law(case=cases(max_batch=2, min_pages=1, regimes=("dyadic",)), share=0.3, one_dtype=True)
def test_memory_of_something_else_is_refused(subject: Subject, arrays: Arrays) -> None:
    on, watched = subject.load(arrays), Watched(subject.backend)
    attention = PrefixAttention("dense", watched, check_contents=True)  # of tables on a device, too
    _, memory = attention(on.q, on.k, on.v, on.context, None, PassInfo(0, num_layers=2))
    kept = host(memory.state.out), host(memory.state.lse)
    shorter = np.where(arrays.page_lengths > 0, arrays.page_lengths - 1, 1).astype(np.int32)
    table = np.where(arrays.page_lengths > 0, arrays.page_table, 0).astype(np.int32)
    longer = subject.load(
        arrays.but(**{name: np.repeat(getattr(arrays, name), 2, axis=2) for name in ("q", "q_other", "k", "v")})
    )
    other_table = subject.ints((table + 1) % len(arrays.k_pages))
    cut = replace(on.context, page_lengths=subject.ints(shorter), page_table=subject.ints(table))
    changed: dict[str, dict[str, Any]] = {
        "another policy": {"driver": PrefixAttention("sliding-window", watched, check_contents=True)},
        "another layer": {"info": PassInfo(1, layer=1, num_layers=2)},
        "another version": {"context": replace(on.context, version=on.context.version + 1)},
        "other page lengths": {"context": cut},
        "another page table": {"context": replace(on.context, page_table=other_table)},
        "another block shape": {"now": longer},
    }
    if len(arrays.k_pages) == 1 or not arrays.page_lengths.any():
        del changed["another page table"]  # there is no other page to point to
    watched.calls.clear()
    usual = {"driver": attention, "now": on, "context": on.context, "info": PassInfo(1, num_layers=2)}
    for name, change in changed.items():
        driver, now, context, info = {**usual, **change}.values()
        try:
            driver(now.q, now.k, now.v, context, memory, info)
        except StaleMemoryError:
            pass
        else:
            expect(False, "MEMORY-2", f"memory of {name} must raise StaleMemoryError")
        expect(watched.calls == [], "DRIVER-1", f"memory of {name}: operators ran: {watched.calls}")
    expect_same_bits(host(memory.state.out), kept[0], "out in the memory after refusals", "MEMORY-2")
    expect_same_bits(host(memory.state.lse), kept[1], "lse in the memory after refusals", "MEMORY-2")


@pytest.mark.clause("ERROR-2", "REGISTRY-1")
@law(one_dtype=True)
def test_an_unknown_policy_is_refused_with_the_nearest_name(subject: Subject) -> None:
    for name, nearest in (("lossa", "losa"), ("losa:actve=3", "active"), ("quest:budgt=4", "budget")):
        try:
            get_policy(name)
        except UnknownNameError as error:
            expect(nearest in str(error), "ERROR-2", f"the refusal of {name!r} must name {nearest!r}; got {error}")
        else:
            expect(False, "ERROR-2", f"{name!r} must be refused")


@pytest.mark.clause("SYNC-1")
@law(case=cases(max_batch=2, min_pages=1, regimes=("dyadic",), layouts=("plain",)), share=0.2)
def test_a_pass_on_a_device_never_waits_for_it(subject: Subject, case: Case) -> None:
    if subject.device_kind == "cpu":
        pytest.skip("the backend computes on the host, where nothing can be synchronised")
    if subject.device_kind != "cuda":
        pytest.skip(f"synchronisation cannot be observed on {subject.device_kind}")
    if subject.backend.capabilities.plans_on_host:
        pytest.skip("the backend declares plans_on_host, so that its passes wait for the device")
    import torch

    on = subject.load(case.arrays(subject.dtype))
    attention, memory = PrefixAttention("losa:budget=4,active=1", subject.backend), None
    _, memory = attention(on.q, on.k, on.v, on.context, memory, PassInfo(0))  # compiles what it needs
    _, memory = attention(on.q, on.k, on.v, on.context, memory, PassInfo(1))
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(on.q, on.k, on.v, on.context, memory, PassInfo(2))
    except RuntimeError as error:
        expect("synchroniz" not in str(error), "SYNC-1", f"a pass waited for the device: {error}")
        raise
    finally:
        torch.cuda.set_sync_debug_mode(mode)
