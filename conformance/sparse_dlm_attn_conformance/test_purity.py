"""Laws of purity: operators are functions of their arguments and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState
from sparse_dlm_attn.ranked import RankedPass
from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import Arrays, Case, Host
from sparse_dlm_attn_conformance.checks import expect, expect_same_bits, expect_state_close
from sparse_dlm_attn_conformance.guards import (
    changed_settings,
    other_settings,
    restored,
    settings_of_the_process,
    stirred_settings,
)
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.operations import OPERATORS, arrays_in, prepare
from sparse_dlm_attn_conformance.oracle import context_keys
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Loaded, Subject, host
from sparse_dlm_attn_conformance.test_context import shares_memory

ROUGH = ("generic", "dyadic", "ties")
ROWWISE = ("attend_pages", "reuse", "attend")


@pytest.mark.clause("PURE-1")
@pytest.mark.parametrize("operator", OPERATORS)
@law(case=cases(), share=0.3)
def test_no_operator_changes_its_arguments(subject: Subject, operator: str, arrays: Arrays) -> None:
    call = prepare(subject, arrays, operator)
    before = {name: host(array) for name, array in call.arguments.items()}
    call.run()
    for name, array in call.arguments.items():
        expect_same_bits(host(array), before[name], f"argument {name} after {operator}", "PURE-1")


@pytest.mark.clause("PURE-5")
@pytest.mark.parametrize("operator", OPERATORS)
@law(case=cases(), share=0.1)
def test_no_operator_changes_a_setting_of_the_process(subject: Subject, operator: str, case: Case) -> None:
    """A first call may set up a compiler that draws random numbers; a second one has no such excuse."""
    call = prepare(subject, case.arrays(subject.dtype), operator)
    with restored():
        before = settings_of_the_process()
        call.run()
        changed = changed_settings(before, random_states=False)
        before = stirred_settings()
        call.run()
        changed += changed_settings(before)
    expect(not changed, "PURE-5", f"{operator} must leave the process as it was, but: {'; '.join(changed)}")


@pytest.mark.clause("PURE-6")
@pytest.mark.parametrize("operator", OPERATORS)
@law(case=cases(regimes=ROUGH), share=0.1)
def test_no_setting_of_the_process_changes_a_result(subject: Subject, operator: str, case: Case) -> None:
    need(subject, "deterministic")
    call = prepare(subject, case.arrays(subject.dtype), operator)
    if not all(hasattr(array, "detach") for array in call.arguments.values()):
        pytest.skip("the backend does not compute with PyTorch, whose settings these are")
    wanted = arrays_in(call.run())
    for setting, holds in other_settings(subject.device_kind).items():
        with holds:
            got = arrays_in(call.run())
        for name, value in got.items():
            what, form = f"{operator}{name} under {setting}", (value.dtype, value.device)
            usual = wanted[name].dtype, wanted[name].device
            expect(form == usual, "PURE-6", f"{what} must have dtype and device {usual}; got {form}")
            expect_same_bits(host(value), host(wanted[name]), what, "PURE-6")


@pytest.mark.clause("PURE-2")
@pytest.mark.parametrize("operator", OPERATORS)
@law(case=cases(regimes=ROUGH), share=0.3)
def test_results_share_no_memory_with_arguments(subject: Subject, operator: str, arrays: Arrays) -> None:
    nobody = np.zeros_like(arrays.active)
    # with all rows active, or none, returning an argument as it is would give the right numbers
    choices = (arrays.active, ~nobody, nobody) if operator in ROWWISE else (arrays.active,)
    for active in choices:
        call = prepare(subject, arrays.but(active=active), operator)
        for name, result in arrays_in(call.run()).items():
            for argument, array in call.arguments.items():
                text = f"{operator}{name} must not share memory with its argument {argument}"
                expect(not shares_memory(result, array), "PURE-2", text)


@pytest.mark.clause("PURE-2")
@law(case=cases(regimes=ROUGH, max_pages=1), share=0.3)
def test_merging_one_state_does_not_hand_it_back(subject: Subject, case: Case) -> None:
    extra = prepare(subject, case.arrays(subject.dtype), "merge").arguments
    state = AttentionState(extra["fresh.out"], extra["fresh.lse"])
    merged = subject.backend.merge(state)
    for name in ("out", "lse"):
        text = f"merge of one state must not share its {name}"
        expect(not shares_memory(getattr(merged, name), getattr(state, name)), "PURE-2", text)


@pytest.mark.clause("PURE-3")
@pytest.mark.parametrize("operator", OPERATORS)
@law(case=cases(regimes=ROUGH), share=0.5)
def test_the_same_input_gives_the_same_bits(subject: Subject, operator: str, arrays: Arrays) -> None:
    """Other work in between must not matter, nor may it change a result handed out before."""
    need(subject, "deterministic")
    first = arrays_in(prepare(subject, arrays, operator).run())
    copies = {name: host(value) for name, value in first.items()}
    prepare(subject, other_problem(arrays), operator).run()
    for name, value in first.items():
        expect_same_bits(host(value), copies[name], f"{operator}{name} after a later call", "PURE-3")
    for _ in range(2):
        for name, value in arrays_in(prepare(subject, arrays, operator).run()).items():
            expect_same_bits(host(value), copies[name], f"{operator}{name} asked again", "PURE-3")


@pytest.mark.clause("PURE-3", "ATTEND-1")
@law(case=cases(regimes=ROUGH, layouts=("plain",), min_pages=1), share=0.5)
def test_a_cache_written_in_place_is_read_anew(subject: Subject, arrays: Arrays, on: Loaded) -> None:
    """Engines write tokens into the same memory: nothing may be remembered by shape or identity."""
    later = arrays.but(
        k_pages=np.where(arrays.stored()[..., None], -arrays.k_pages, arrays.k_pages),
        v_pages=np.where(arrays.stored()[..., None], -arrays.v_pages[:, :, :, ::-1], arrays.v_pages),
    )
    attend_and_bound(subject, arrays, on)
    written = subject.load(later)
    try:
        for name in ("k_pages", "v_pages"):
            target = getattr(on.context, name)
            if isinstance(target, np.ndarray):
                (target if target.base is None else target.base).flags.writeable = True
                target.flags.writeable = True
            target[...] = getattr(written.context, name)
    except (TypeError, ValueError, RuntimeError):  # arrays that cannot be written: other memory, same shapes
        on = written
    attend_and_bound(subject, later, on)


def attend_and_bound(subject: Subject, arrays: Arrays, on: Loaded) -> None:
    """Check attention and bounds against the oracle."""
    state = subject.backend.attend_pages(on.q, on.context, on.selection, on.active, scale=arrays.scale)
    expect_state_close(
        host(state.out),
        host(state.lse),
        accuracy.attention(arrays, context_keys(arrays)),
        "attend_pages over a cache written in place",
        "PURE-3",
    )
    lower = host(subject.backend.page_bounds(on.context).lower)
    expect_same_bits(lower.astype(np.float64), arrays.bounds().lower, "bounds of a cache written in place", "PURE-3")


def other_problem(arrays: Arrays) -> Arrays:
    """Return a problem of the same shapes in which everything else differs."""
    return arrays.but(
        q=-arrays.q[:, :, ::-1],
        q_other=arrays.q,
        k=arrays.v,
        v=arrays.k,
        k_pages=-arrays.k_pages,
        v_pages=arrays.k_pages,
        mask=~arrays.mask,
        active=~arrays.active,
    )


def need(subject: Subject, capability: str) -> None:
    """Skip a law of a capability that the backend does not declare."""
    if not getattr(subject.backend.capabilities, capability):
        pytest.skip(f"the backend does not declare {capability}")


@pytest.mark.clause("PURE-4")
@pytest.mark.parametrize(
    "operator",
    (
        "page_bounds",
        "page_scores",
        "pooled_scores",
        "query_change",
        "attend_pages",
        "attend_block",
        "attend",
        "attend_ranked",
    ),
)
@law(case=cases(regimes=ROUGH), share=0.5)
def test_a_sequence_does_not_depend_on_its_batch(subject: Subject, operator: str, case: Case, arrays: Arrays) -> None:
    need(subject, "batch_invariant")
    together = prepared_results(subject, arrays, operator)
    for b in range(case.batch):
        alone = prepared_results(subject, single(arrays, b), operator)
        for name, value in alone.items():
            expect_same_bits(
                host(value)[0], host(together[name])[b], f"{operator}{name} of sequence {b} alone", "PURE-4"
            )


def prepared_results(subject: Subject, arrays: Arrays, operator: str) -> dict[str, Any]:
    """Run an operator with no cached state, which would differ between batch and single."""
    if operator not in ("attend", "attend_ranked"):
        return arrays_in(prepare(subject, arrays, operator).run())
    on = subject.load(arrays)
    if operator == "attend_ranked":
        rule = RankedPass(arrays.page_size, 2, reference=on.q_other, count=2, keep="queries")
        bounds = subject.bounds(arrays.bounds())
        return arrays_in(
            subject.backend.attend_ranked(on.q, on.k, on.v, on.context, bounds, rule, None, scale=arrays.scale)
        )
    return arrays_in(
        subject.backend.attend(on.q, on.k, on.v, on.context, on.selection, on.active, None, scale=arrays.scale)
    )


def single(arrays: Arrays, b: int) -> Arrays:
    """Return the problem of one sequence of a batch."""
    return of_sequences(arrays, np.asarray([b]))


def of_sequences(arrays: Arrays, numbers: Host) -> Arrays:
    """Return the problem of some sequences of a batch, by their numbers."""
    names = ("q", "q_other", "k", "v", "page_table", "page_lengths", "page_segments", "mask", "active")
    parts = {name: getattr(arrays, name) for name in names}
    return arrays.but(**{name: part[numbers] for name, part in parts.items() if part is not None})
