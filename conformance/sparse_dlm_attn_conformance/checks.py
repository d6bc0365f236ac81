"""Assertions with one grammar: clause, what, worst index, got, expected, error, budget."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_dlm_attn import AttentionState, PageBounds
from sparse_dlm_attn.arrays import dtype_name, shape_of
from sparse_dlm_attn_conformance.accuracy import Expected
from sparse_dlm_attn_conformance.cases import Host
from sparse_dlm_attn_conformance.subjects import Subject, host


class ConformanceFailure(AssertionError):
    """A law of the specification does not hold.

    Parameters
    ----------
    clause : str
        The clause that is broken.
    text : str
        What was found, in one or more lines.
    """

    def __init__(self, clause: str, text: str) -> None:
        self.clause = clause
        super().__init__(f"{clause}: {text}")


def expect(condition: object, clause: str, text: str) -> None:
    """Fail with ``text`` unless ``condition`` holds."""
    if not condition:
        raise ConformanceFailure(clause, text)


def expect_array(subject: Subject, value: Any, what: str, shape: tuple[int, ...], dtype: str, clause: str) -> Host:
    """Check library, device, shape and dtype of a result, and return it on the host."""
    expect(
        subject.owns(value),
        clause,
        f"{what} must be an array like those of the backend's asarray(), on {subject.device}; "
        f"got {type(value).__module__}.{type(value).__qualname__}",
    )
    expect(shape_of(value) == shape, clause, f"{what} must have shape {shape}; got {shape_of(value)}")
    names = ("bool", "bool_") if dtype == "bool" else (dtype,)
    expect(dtype_name(value) in names, clause, f"{what} must have dtype {dtype}; got {dtype_name(value)}")
    return host(value)


def expect_state(
    subject: Subject, value: Any, what: str, shape: tuple[int, ...], clause: str = "STATE-4"
) -> tuple[Host, Host]:
    """Check that ``value`` is an `AttentionState` of the right types; return ``(out, lse)``."""
    text = f"{what} must return an AttentionState; got {type(value).__qualname__}"
    expect(isinstance(value, AttentionState), clause, text)
    out = expect_array(subject, value.out, f"{what}.out", shape, subject.dtype, clause)
    return out, expect_array(subject, value.lse, f"{what}.lse", shape[:3], "float32", clause)


def expect_bounds(
    subject: Subject, value: Any, what: str, shape: tuple[int, ...], clause: str = "BOUNDS-1"
) -> tuple[Host, Host]:
    """Check that ``value`` is a `PageBounds` of the right types; return ``(lower, upper)``."""
    expect(isinstance(value, PageBounds), clause, f"{what} must return PageBounds; got {type(value).__qualname__}")
    lower = expect_array(subject, value.lower, f"{what}.lower", shape, subject.dtype, clause)
    return lower, expect_array(subject, value.upper, f"{what}.upper", shape, subject.dtype, clause)


def expect_same_bits(actual: Host, expected: Host, what: str, clause: str) -> None:
    """Check equality of every element; NaN equals NaN, and 0 equals -0."""
    expect(actual.shape == expected.shape, clause, f"{what} must have shape {expected.shape}; got {actual.shape}")
    floating = np.issubdtype(actual.dtype, np.floating)
    different = (actual != expected) & ~(floating & (actual != actual) & (expected != expected))
    if different.any():
        where = tuple(int(i) for i in np.argwhere(different)[0])
        raise ConformanceFailure(
            clause,
            f"{what} must be equal bit for bit; {int(different.sum())} of {different.size} elements "
            f"differ, the first at {where}: got {actual[where]!s}, expected {expected[where]!s}",
        )


def expect_same_state(actual: AttentionState, expected: AttentionState, what: str, clause: str) -> None:
    """Check two states for equal bits."""
    expect_same_bits(host(actual.out), host(expected.out), f"{what}: out", clause)
    expect_same_bits(host(actual.lse), host(expected.lse), f"{what}: lse", clause)


def expect_close(actual: Host, expected: Host, budget: Host | float, what: str, clause: str) -> None:
    """Check ``|actual - expected| <= budget``, after NaN and the infinities as sets."""
    got, want = actual.astype(np.float64), np.broadcast_to(expected, actual.shape).astype(np.float64)
    for name, test in (("NaN", np.isnan), ("-inf", np.isneginf), ("+inf", np.isposinf)):
        different = test(got) != test(want)
        if different.any():
            where = tuple(int(i) for i in np.argwhere(different)[0])
            raise ConformanceFailure(
                clause,
                f"{what} must be {name} in the same places; at {where} got {got[where]:.9g}, "
                f"expected {want[where]:.9g}",
            )
    finite = np.isfinite(want)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(got - want), 0.0)
    allowed = np.broadcast_to(np.asarray(budget, dtype=np.float64), error.shape)
    excess = error - allowed
    if (excess > 0).any():
        where = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), excess.shape))
        raise ConformanceFailure(
            clause,
            f"{what} lies outside the error budget; worst at {where}: got {got[where]:.9g}, expected "
            f"{want[where]:.9g}, error {error[where]:.3g}, budget {allowed[where]:.3g}",
        )


def expect_alike(
    got: AttentionState,
    want: AttentionState,
    budget: Expected,
    what: str,
    clause: str,
    mine: Any = slice(None),
    theirs: Any = slice(None),
) -> None:
    """Check that two states, or heads of them, are both within one budget."""
    for name in ("lse", "out"):
        values = host(getattr(got, name))[:, mine], host(getattr(want, name))[:, theirs]
        expect_close(*values, 2 * getattr(budget, f"{name}_budget")[:, mine], f"{name} {what}", clause)


def expect_state_close(out: Host, lse: Host, expected: Expected, what: str, clause: str) -> None:
    """Check a state against oracle and budget; lse first, because it names most mistakes better."""
    expect_close(lse, expected.state.lse, expected.lse_budget, f"{what}: lse", clause)
    expect_close(out, expected.state.out, expected.out_budget, f"{what}: out", clause)
