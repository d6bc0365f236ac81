"""Laws of a backend as a whole: it loads, converts, and says what it supports without computing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import Backend, PrefixAttention, UnavailableError, UnknownNameError, UnsupportedError, get_backend
from sparse_dlm_attn.capabilities import Capabilities, Problem
from sparse_dlm_attn_conformance.cases import Case, round_to, transport
from sparse_dlm_attn_conformance.checks import ConformanceFailure, expect, expect_array, expect_same_bits
from sparse_dlm_attn_conformance.doubles import Watched
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.operations import OPERATORS
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import DTYPES, Loaded, Subject


@pytest.mark.clause("REGISTRY-1", "CAPS-1")
def test_the_backend_loads(subject: Subject) -> None:
    """One failure says why; every other law of a backend that does not load is skipped."""
    if subject.instance is None:
        raise ConformanceFailure("REGISTRY-1", f"backend {subject.spec!r} must load; {subject.error}")


@pytest.mark.clause("REGISTRY-1")
@law(one_dtype=True)
def test_every_operator_can_be_called(subject: Subject) -> None:
    for name in (*OPERATORS, "asarray", "why_not"):
        expect(callable(getattr(subject.backend, name, None)), "REGISTRY-1", f"{name} must be a method")
    expect(isinstance(getattr(subject.backend, "name", None), str), "REGISTRY-1", "name must be a str")


@pytest.mark.clause("CAPS-1")
@law()
def test_capabilities_are_well_formed(subject: Subject) -> None:
    declared = subject.backend.capabilities
    expect(isinstance(declared, Capabilities), "CAPS-1", "capabilities must be a Capabilities value")
    expect(declared == subject.backend.capabilities, "CAPS-1", "capabilities must not change")
    for name in ("head_dims", "page_sizes", "groups"):
        sizes: Any = getattr(declared, name)
        well = sizes is None or (
            isinstance(sizes, tuple) and sizes and all(isinstance(size, int) and size >= 1 for size in sizes)
        )
        expect(well, "CAPS-1", f"capabilities.{name} must be None or a tuple of sizes; got {sizes!r}")
    expect(bool(declared.devices), "CAPS-1", "capabilities.devices must name a device")
    text = f"asarray() makes arrays on {subject.device_kind}, which capabilities.devices does not name"
    expect(subject.device_kind in declared.devices, "CAPS-1", text)


@pytest.mark.clause("CAPS-1")
@law(case=cases(), share=0.3)
def test_why_not_gives_every_reason_without_running_a_kernel(subject: Subject, case: Case) -> None:
    watched = Watched(subject.backend)
    problem = case.problem(subject.dtype, subject.device_kind)
    expect(watched.why_not(problem) == [], "CAPS-1", "a declared problem must have no reason against it")
    undeclared = Problem("int4", case.head_dim, case.page_size, case.q_heads, case.kv_heads, case.tokens, "abacus")
    reasons = watched.why_not(undeclared)
    text = f"why_not must return a list of texts; got {reasons!r}"
    expect(isinstance(reasons, list) and all(isinstance(reason, str) for reason in reasons), "CAPS-1", text)
    expect(len(reasons) >= 2, "CAPS-1", f"why_not must give every reason (dtype and device); got {reasons!r}")
    expect(watched.calls == [], "CAPS-1", "why_not must run no kernel")


@pytest.mark.clause("CAPS-1")
@law(case=cases(), share=0.3)
def test_what_is_not_declared_is_refused(subject: Subject, case: Case) -> None:
    """`why_not` may be stricter than the capabilities, never laxer."""
    declared, backend = subject.backend.capabilities, subject.backend
    problem = case.problem(subject.dtype, subject.device_kind)
    others: dict[str, Problem] = {"dtypes": replace(problem, dtype="int4")}
    others["devices"] = replace(problem, device="abacus")
    if declared.head_dims is not None:
        others["head_dims"] = replace(problem, head_dim=max(declared.head_dims) + 1)
    if declared.page_sizes is not None:
        others["page_sizes"] = replace(problem, page_size=max(declared.page_sizes) + 1)
    if declared.groups is not None:
        others["groups"] = replace(problem, q_heads=problem.kv_heads * (max(declared.groups) + 1))
    if declared.max_block_length is not None:
        others["max_block_length"] = replace(problem, block_length=declared.max_block_length + 1)
    for name, other in others.items():
        reasons = backend.why_not(other)
        text = f"why_not must refuse what capabilities.{name} leave out; got {reasons!r} for {other}"
        expect(isinstance(reasons, list) and len(reasons) > 0, "CAPS-1", text)


@pytest.mark.clause("CAPS-1", "DRIVER-1")
@law(case=cases(max_batch=1), share=0.3, one_dtype=True)
def test_an_unsupported_problem_raises_with_every_reason(subject: Subject, on: Loaded) -> None:
    reasons = ("head_dim is odd today", "the moon is wrong")
    watched = Watched(subject.backend, reasons)
    try:
        PrefixAttention("dense", watched)(on.q, on.k, on.v, on.context)
    except UnsupportedError as error:
        expect(
            all(reason in str(error) for reason in reasons), "CAPS-1", f"the error must give every reason; got {error}"
        )
    else:
        expect(False, "CAPS-1", "an unsupported problem must raise UnsupportedError")
    expect(watched.calls == [], "DRIVER-1", f"no operator may run before the refusal; got {watched.calls}")


@pytest.mark.clause("STATE-4", "CAPS-1")
@law()
def test_asarray_converts_exactly_and_by_dtype_name(subject: Subject) -> None:
    values = round_to(np.linspace(-3, 3, 24).reshape(2, 3, 4), subject.dtype)
    array = subject.backend.asarray(transport(values, subject.dtype), dtype=subject.dtype)
    got = expect_array(subject, array, "asarray", (2, 3, 4), subject.dtype, "STATE-4")
    expect_same_bits(got.astype(np.float64), values, "asarray", "STATE-4")
    for kind in ("bool", "int8", "int32"):
        host = np.asarray([[0, 1], [1, 1]]).astype(kind)
        got = expect_array(subject, subject.backend.asarray(host, dtype=kind), "asarray", (2, 2), kind, "STATE-4")
        expect_same_bits(got, host, f"asarray of {kind}", "STATE-4")
    expect_array(
        subject, subject.backend.asarray([1.0, 2.0], dtype="float32"), "asarray of a list", (2,), "float32", "STATE-4"
    )


@pytest.mark.clause("ERROR-2", "REGISTRY-1")
@law(one_dtype=True)
def test_a_request_is_met_or_refused_never_replaced(subject: Subject) -> None:
    expect(get_backend(subject.backend) is subject.backend, "ERROR-2", "an instance must be used as it is")
    for name, error in (("no-such-backend", UnknownNameError), ("no_such_module:Backend", UnavailableError)):
        try:
            found: Backend = get_backend(name)
        except error:
            continue
        expect(False, "ERROR-2", f"asking for {name!r} must raise {error.__name__}; got {found!r}")


@pytest.mark.clause("CAPS-1")
@law(one_dtype=True)
def test_declared_dtypes_are_known(subject: Subject) -> None:
    unknown = [name for name in subject.backend.capabilities.dtypes if name not in DTYPES]
    expect(not unknown, "CAPS-1", f"capabilities.dtypes may hold {', '.join(DTYPES)}; got {unknown}")
