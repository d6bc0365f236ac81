"""How a law runs: on generated problems, with a budget of examples, a time limit and a ledger.

A law is a test function ``test_...(subject, **drawn)`` with the clauses it holds as a pytest mark and
a strategy for each drawn argument::

    @pytest.mark.clause("MERGE-3")
    @law(table=merge_tables())
    def test_the_empty_state_is_the_identity(subject, table): ...

It may take ``arrays``, the values of the drawn ``case`` (or of the episode's), and ``on``, these as arrays of
the backend. pytest hands in the subject; calling the law without pytest works as well (`check_backend` does).
"""

from __future__ import annotations

import functools
import inspect
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, Phase, event, given, reject, settings
from hypothesis import errors as hypothesis_errors
from hypothesis.strategies import SearchStrategy

from sparse_dlm_attn_conformance.checks import ConformanceFailure
from sparse_dlm_attn_conformance.guards import TimeLimitExceeded, last_resort, restored, time_limit
from sparse_dlm_attn_conformance.ledger import KnownFailure, Ledger
from sparse_dlm_attn_conformance.strategies import within
from sparse_dlm_attn_conformance.subjects import Subject

CALM = tuple(HealthCheck)
"""No health check: a backend may compile, refuse problems, or be slow; `Record` counts what ran."""
SHRINK_SECONDS = 15.0
REFUSALS = 40
PACKAGE = Path(__file__).parent


class NothingDeclared(BaseException):
    """The backend refused every problem so far; no `Exception`, so that Hypothesis lets it pass."""


@dataclass(frozen=True)
class LawOptions:
    """What holds for every law of a run."""

    ledger: Ledger = field(default_factory=Ledger)
    seconds: float = 120.0  # of one example
    profile: settings | None = None  # None: the Hypothesis profile that is loaded
    shrink: bool = True  # whether a failing problem is made smaller


@dataclass
class Record:
    """What a law did: examples run and refused, what they covered, known failures met."""

    examples: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    statistics: str = ""


OPTIONS: ContextVar[LawOptions] = ContextVar("options of the run", default=LawOptions())  # noqa: B039
RECORD: ContextVar[Record | None] = ContextVar("record of the running law", default=None)


def clauses_of(function: Any) -> tuple[str, ...]:
    """Return the clauses that a law or test is marked with."""
    marks = getattr(function, "pytestmark", [])
    return tuple(clause for mark in marks if mark.name == "clause" for clause in mark.args)


def law(
    *, share: float = 1.0, one_dtype: bool = False, **strategies: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function of a subject and drawn arguments into a law.

    Parameters
    ----------
    share : float
        Part of the profile's examples that it runs, for laws that are slow or narrow.
    one_dtype : bool
        Whether nothing in the law depends on the dtype of q, K and V, so that pytest runs it once.
    **strategies
        A strategy for each drawn argument.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(subject: Subject, **fixed: Any) -> None:
            __tracebackhide__ = True
            LawRun(run, body, subject, fixed, share, strategies).run()

        signature = inspect.signature(function)
        drawn = {*strategies, "arrays", "on"}
        given_by_pytest = [p for name, p in signature.parameters.items() if name not in drawn]

        @functools.wraps(function)
        def body(subject: Subject, **given: Any) -> None:
            __tracebackhide__ = True
            problem: Any = given.get("case", getattr(given.get("episode"), "case", None))
            if "arrays" in signature.parameters or "on" in signature.parameters:
                given["arrays"] = problem.arrays(subject.dtype)
            if "on" in signature.parameters:
                given["on"] = subject.load(given["arrays"])
            function(subject, **{name: value for name, value in given.items() if name in signature.parameters})

        run.__name__, run.__qualname__ = function.__name__, function.__qualname__
        run.__doc__, run.__module__ = function.__doc__, function.__module__
        run.__signature__ = signature.replace(parameters=given_by_pytest)  # type: ignore[attr-defined]
        run.body = body  # type: ignore[attr-defined]
        run.one_dtype = one_dtype  # type: ignore[attr-defined]
        return run

    return decorate


def law_settings(share: float = 1.0) -> settings:
    """Return the Hypothesis settings of a law under the options in force."""
    options = OPTIONS.get()
    profile: settings = options.profile or settings.default  # type: ignore[assignment]
    phases = [phase for phase in profile.phases if phase is not Phase.explain]
    if not options.shrink:
        phases = [phase for phase in phases if phase is not Phase.shrink]
    return settings(
        profile,
        max_examples=max(1, round(profile.max_examples * share)),
        deadline=None,
        suppress_health_check=CALM,
        phases=phases,
    )


@dataclass
class LawRun:
    """One law on one subject."""

    law: Callable[..., None]
    body: Callable[..., None]
    subject: Subject
    fixed: dict[str, Any]
    share: float
    strategies: dict[str, SearchStrategy[Any]]
    failures: dict[str, ConformanceFailure] = field(default_factory=dict)
    first_failure: float | None = None
    matched: Counter[str] = field(default_factory=Counter)
    record: Record = field(default_factory=Record)

    def run(self) -> None:
        """Run the law's examples; raise `ConformanceFailure` with everything one needs to know."""
        __tracebackhide__ = True
        require_loaded(self.subject)
        entries = self.entries()
        self.record = RECORD.get() or self.record
        with within(self.subject.backend.capabilities), last_resort(OPTIONS.get().seconds):
            try:
                if self.strategies:
                    self.hypothesis_test(entries)()
                else:
                    self.example({}, entries)
            except (NothingDeclared, hypothesis_errors.Unsatisfiable, hypothesis_errors.UnsatisfiedAssumption):
                pass  # nothing could be run: `conclude` says why
            except hypothesis_errors.Flaky as error:
                raise self.flaky(error) from None
            except TimeLimitExceeded as error:
                raise ConformanceFailure(self.clauses[0], f"{error}; it was interrupted") from None
        self.conclude(entries)

    @property
    def clauses(self) -> tuple[str, ...]:
        """The clauses this law holds."""
        return clauses_of(self.law) or ("UNMARKED",)

    def entries(self) -> tuple[KnownFailure, ...]:
        """Return the known failures of this law on this subject."""
        policy = str(self.fixed.get("policy", ""))
        return OPTIONS.get().ledger.concerning(
            self.body.__name__, self.clauses, self.subject.spec, self.subject.dtype, policy
        )

    def hypothesis_test(self, entries: tuple[KnownFailure, ...]) -> Callable[[], None]:
        """Build the property test of this run."""

        def body(**drawn: Any) -> None:
            __tracebackhide__ = True
            self.example(drawn, entries)

        # Hypothesis tells tests apart by source; this source is the same for every law. Repeated draws depend on
        # the law alone, so that one kernel under two names meets the same problems; what a run stores does not.
        chosen = law_settings(self.share)
        identity = f"{self.body.__module__}.{self.body.__name__}"
        if not chosen.derandomize:
            identity += f"-{self.subject}-{self.fixed}"
        body._hypothesis_internal_add_digest = identity.encode()  # type: ignore[attr-defined]
        test = chosen(given(**self.strategies)(body))
        return cast("Callable[[], None]", test)

    def example(self, drawn: dict[str, Any], entries: tuple[KnownFailure, ...]) -> None:
        """Run the law on one drawn problem."""
        __tracebackhide__ = True
        key = repr(drawn)
        if key in self.failures:
            raise self.failures[key]
        if self.first_failure is not None and time.monotonic() - self.first_failure > SHRINK_SECONDS:
            reject()  # enough shrinking: only what is known to fail may still be replayed
        self.refuse_undeclared(drawn)
        matching = [entry for entry in entries if entry.matches(self.facts(drawn))]
        if any(entry.crash for entry in matching):
            for entry in matching:
                self.record.known[entry.reason] += 1
            reject()
        failure = self.attempt(drawn)
        self.record.examples += 1
        self.matched.update(entry.reason for entry in matching)
        if failure is not None and matching:
            for entry in matching:
                self.record.known[entry.reason] += 1
        elif failure is not None:
            self.failures[key] = failure
            self.first_failure = self.first_failure or time.monotonic()
            raise failure

    def attempt(self, drawn: dict[str, Any]) -> ConformanceFailure | None:
        """Run the body; return what failed, whether a law or the backend's own code."""
        for value in drawn.values():
            for feature in getattr(value, "features", list)():
                self.record.features[feature] += 1
                event(feature)  # for --hypothesis-show-statistics
        try:
            with restored(), time_limit(OPTIONS.get().seconds, self.body.__name__):
                self.body(self.subject, **self.fixed, **drawn)
        except ConformanceFailure as error:
            return self.explained(error.clause, str(error).partition(": ")[2], drawn)
        except BaseException as error:
            if is_ours(error):
                raise
            return self.explained(self.clauses[0], foreign(error), drawn)
        return None

    def refuse_undeclared(self, drawn: dict[str, Any]) -> None:
        """Leave out problems that the backend says it does not compute."""
        for value in drawn.values():
            if hasattr(value, "problem"):
                refuse_undeclared(self.subject, value, self.record)

    def facts(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """Return what a ledger's ``when`` may speak about."""
        found: dict[str, Any] = {"dtype": self.subject.dtype, "policy": str(self.fixed.get("policy", ""))}
        for name, value in drawn.items():
            found[name] = value
            if hasattr(value, "problem"):
                found.update(vars(value))
                found.update({n: getattr(value, n) for n in ("batch", "pages", "q_heads") if hasattr(value, n)})
        return found

    def explained(self, clause: str, text: str, drawn: dict[str, Any]) -> ConformanceFailure:
        """Return the failure with problem and snippet."""
        values = {**self.fixed, **drawn}
        shown = "".join(f"\n  {name} = {value!r}" for name, value in values.items())
        return ConformanceFailure(
            clause,
            f"{text}\nlaw: {self.body.__name__} ({', '.join(self.clauses)})"
            f"\nbackend: {self.subject.spec}, dtype {self.subject.dtype}\nproblem:{shown or ' none'}"
            f"\nreproduce with:\n{snippet(self.body, self.subject, values)}",
        )

    def flaky(self, error: Exception) -> ConformanceFailure:
        """Return the failure of a backend that answers differently when asked again."""
        found = next(iter(self.failures.values()), None)
        reason = str(found) if found is not None else f"{type(error).__name__}: {error}"
        return ConformanceFailure(
            "PURE-3",
            f"the same problem failed and then passed, so results are not a function of their "
            f"inputs. The failure was:\n{reason}",
        )

    def conclude(self, entries: tuple[KnownFailure, ...]) -> None:
        """Fail on ledger entries that are out of date; skip a law that had nothing to run."""
        for entry in entries:
            matched = self.matched[entry.reason]
            if matched and not self.record.known[entry.reason]:
                raise ConformanceFailure(
                    self.clauses[0],
                    f"all {matched} problems of the known failure {entry.reason!r} "
                    f"({entry.link}) passed: remove its entry from the ledger",
                )
        if not self.record.known:
            skip_if_nothing_ran(self.record)


def refuse_undeclared(subject: Subject, value: Any, record: Record | None) -> None:
    """Reject a drawn problem that the backend says it does not compute, and count that.

    Raises
    ------
    NothingDeclared
        If it was so with the first `REFUSALS` problems.
    """
    with time_limit(OPTIONS.get().seconds, "why_not"):
        reasons = subject.backend.why_not(value.problem(subject.dtype, subject.device_kind))
    if not reasons or not isinstance(reasons, list | tuple):  # a law of CAPS-1 checks the type
        return
    if record is not None:
        record.refused["; ".join(map(str, reasons))] += 1
        if not record.examples and sum(record.refused.values()) >= REFUSALS:
            raise NothingDeclared
    reject()


def skip_if_nothing_ran(record: Record) -> None:
    """Skip a law that no problem was computed for, saying why."""
    if record.examples == 0:
        reasons = "; ".join(dict(record.refused.most_common(3))) or "no problem could be drawn"
        pytest.skip(f"the backend declares none of the drawn problems: {reasons}")


def require_loaded(subject: Subject) -> None:
    """Skip unless the backend loaded (that it did not is one failure, not a hundred)."""
    if subject.instance is None:
        pytest.skip(f"backend {subject.spec!r} did not load")


def is_ours(error: BaseException) -> bool:
    """Return whether an exception steers the run: a skip, an interrupt, a time limit."""
    steering = (KeyboardInterrupt, TimeLimitExceeded, NothingDeclared, pytest.skip.Exception)
    return isinstance(error, steering) or type(error).__module__.split(".")[0] == "hypothesis"


def foreign(error: BaseException) -> str:
    """Describe an exception of the code under test, with its own last frames."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if PACKAGE not in Path(frame.filename).parents] or list(frames)
    lines = "".join(f"\n  {f.filename}:{f.lineno} in {f.name}: {f.line}" for f in theirs[-3:])
    return f"the code under test raised {type(error).__name__}: {error}{lines}"


def snippet(body: Callable[..., None], subject: Subject, values: dict[str, Any]) -> str:
    """Return Python lines that run the law again on this very problem."""
    module = body.__module__.rpartition(".")[2]
    values = {name: str(value) if name == "policy" else value for name, value in values.items()}
    arguments = "".join(f",\n      {name}={value!r}" for name, value in values.items())
    return (
        "  from math import inf, nan\n"
        "  from sparse_dlm_attn_conformance import *\n"
        f"  reproduce({subject.spec!r}, '{module}::{body.__name__}', dtype={subject.dtype!r}{arguments})"
    )
