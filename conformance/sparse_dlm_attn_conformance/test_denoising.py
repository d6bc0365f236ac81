"""The state machine over denoising, for every policy."""

from __future__ import annotations

import pytest
from hypothesis import errors as hypothesis_errors
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from sparse_dlm_attn_conformance.checks import ConformanceFailure
from sparse_dlm_attn_conformance.contenders import Contender
from sparse_dlm_attn_conformance.denoising import Denoising
from sparse_dlm_attn_conformance.laws import (
    OPTIONS,
    RECORD,
    NothingDeclared,
    Record,
    clauses_of,
    foreign,
    is_ours,
    law_settings,
    require_loaded,
    skip_if_nothing_ran,
)
from sparse_dlm_attn_conformance.strategies import within
from sparse_dlm_attn_conformance.subjects import Subject
from sparse_dlm_attn_conformance.timing import TimeLimitExceeded, last_resort

SHARE = 0.25


@pytest.mark.clause("POLICY-1", "MEMORY-1", "MEMORY-2", "MEMORY-3")
def test_denoising_goes_as_on_the_reference(subject: Subject, policy: Contender) -> None:
    """Passes, save passes, growing prefixes, dropped and stale memory, in any order."""
    require_loaded(subject)
    if policy.instance is None:
        pytest.skip(f"policy {policy.spec!r} did not load")
    if known(subject, policy):
        pytest.skip("known failure of the ledger: a state machine has no single problem to match")
    machine = type("Machine", (Denoising,), {"subject": subject, "policy": policy.instance})
    chosen = settings(law_settings(SHARE), print_blob=False)
    with within(subject.backend.capabilities), last_resort(OPTIONS.get().seconds):
        try:
            run_state_machine_as_test(machine, settings=chosen)
        except (NothingDeclared, hypothesis_errors.Unsatisfiable):
            skip_if_nothing_ran(RECORD.get() or Record())
        except ConformanceFailure as error:
            raise told(error, subject, policy) from None
        except hypothesis_errors.Flaky as error:
            text = f"the same steps gave another result when they were taken again.{found_in(error)}"
            raise told(ConformanceFailure("POLICY-1", text), subject, policy, error) from None
        except TimeLimitExceeded as error:
            raise ConformanceFailure("POLICY-1", f"{error}; it was interrupted") from None
        except BaseException as error:
            if is_ours(error) and not isinstance(error, Exception):
                raise
            raise told(ConformanceFailure("POLICY-1", foreign(error)), subject, policy, error) from None


def found_in(error: BaseException) -> str:
    """Return what failed before the steps were taken again."""
    found = [part for part in getattr(error, "exceptions", ()) if isinstance(part, ConformanceFailure)]
    return "".join(f" The failure was: {part}" for part in found[:1])


def told(
    failure: ConformanceFailure, subject: Subject, policy: Contender, cause: BaseException | None = None
) -> ConformanceFailure:
    """Return the failure with the steps that lead to it, as Python that takes them again."""
    text = str(failure).partition(": ")[2]
    return ConformanceFailure(
        failure.clause,
        f"{text}\nlaw: test_denoising_goes_as_on_the_reference\nbackend: {subject.spec}, "
        f"dtype {subject.dtype}\npolicy: {policy.spec}\nreproduce with:\n"
        "  from sparse_dlm_attn_conformance import *\n"
        f"  state = reproduce_denoising({subject.spec!r}, {policy.spec!r}, dtype={subject.dtype!r})\n"
        + "".join(f"  {line}\n" for line in steps(getattr(cause or failure, "__notes__", []))),
    )


def steps(notes: list[str]) -> list[str]:
    """Return the steps among Hypothesis's notes, each on one line."""
    taken: list[str] = []
    for line in "\n".join(notes).splitlines():
        if line.startswith("state.") and "teardown" not in line:
            taken.append(line)
        elif taken and line.startswith(" "):  # Hypothesis breaks long values over several lines
            taken[-1] += line
    return taken


def known(subject: Subject, policy: Contender) -> bool:
    """Return whether the ledger knows this state machine to fail, and count that."""
    law = test_denoising_goes_as_on_the_reference
    entries = OPTIONS.get().ledger.concerning(law.__name__, clauses_of(law), subject.spec, subject.dtype, policy.spec)
    entries = tuple(entry for entry in entries if entry.law)
    record = RECORD.get()
    for entry in entries:
        if record is not None:
            record.known[entry.reason] += 1
    return bool(entries)
