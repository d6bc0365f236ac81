"""A run of the suite: on which subjects, with how many problems; under pytest, or from Python."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

import sparse_dlm_attn
from sparse_dlm_attn import Backend, InvalidArgumentError, UnknownNameError, get_policy
from sparse_dlm_attn.errors import DataFileError
from sparse_dlm_attn_conformance import PROFILES
from sparse_dlm_attn_conformance.clauses import check_clauses, matches
from sparse_dlm_attn_conformance.contenders import Contender, contenders
from sparse_dlm_attn_conformance.laws import CALM, OPTIONS, LawOptions, Record, clauses_of
from sparse_dlm_attn_conformance.ledger import Ledger
from sparse_dlm_attn_conformance.report import Report, Result, write_report
from sparse_dlm_attn_conformance.subjects import DTYPES, Subject, load_backend


def register_profiles(database: str = ".hypothesis/sda-nightly") -> None:
    """Register the Hypothesis profiles ``sda-quick``, ``sda-ci`` and ``sda-nightly``.

    The nightly one stores failing problems in ``database``, so that the next night replays them;
    the others store nothing and repeat the same problems unless a seed is given.
    """
    for name, examples in PROFILES.items():
        nightly = name == "nightly"
        settings.register_profile(
            f"sda-{name}",
            settings.get_profile("default"),
            max_examples=examples,
            database=DirectoryBasedExampleDatabase(database) if nightly else None,
            derandomize=not nightly,
            stateful_step_count=40 if nightly else 12,
            phases=(Phase.explicit, *([Phase.reuse] if nightly else []), Phase.generate, Phase.shrink),
            deadline=None,
            suppress_health_check=CALM,
            print_blob=False,
        )


def subjects_of(spec: str, dtypes: tuple[str, ...] = (), *, seconds: float = 120.0, **options: Any) -> list[Subject]:
    """Return a subject for each wanted dtype that a backend declares; one that says why if it has none."""
    backend, error = load_backend(spec, seconds=seconds, **options)
    if backend is None:
        return [Subject(spec, "any", None, error)]
    declared = [name for name in DTYPES if name in backend.capabilities.dtypes]
    chosen = [name for name in declared if not dtypes or name in dtypes]
    wanted = f"none of {', '.join(dtypes)} is among the declared dtypes {', '.join(declared)}"
    return [Subject(spec, name, backend) for name in chosen] or [Subject(spec, "any", None, wanted)]


@dataclass
class Session:
    """A run under pytest: what is under test, the ``clauses`` that it is restricted to, and what it found."""

    subjects: list[Subject]
    contenders: list[Contender]
    clauses: tuple[str, ...]
    report: Report
    paths: tuple[str, ...]
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of_config(cls, config: pytest.Config) -> Session:
        """Build the session that pytest's options describe, and load its profile."""
        option = config.getoption
        # The command, which alone wants to know that the run has finished, calls its options so.
        prefix = "--" if option("--sda-finished") else "--sda-"
        clauses, dtypes = tuple(option("--sda-clause")), tuple(option("--sda-dtype"))
        seconds, device, ledger = (option(f"--sda-{name}") for name in ("seconds", "device", "known-failures"))
        check_clauses(clauses, f"{prefix}clause")
        for dtype in dtypes:
            if dtype not in DTYPES:
                raise UnknownNameError(f"dtype in {prefix}dtype", dtype, DTYPES)
        OPTIONS.set(LawOptions(Ledger.read(ledger) if ledger else Ledger(), seconds))
        profile = load_profile(config)
        options = {} if device is None else {"device": device}
        specs = dict.fromkeys(option("--sda-backend"))
        subjects = [one for spec in specs for one in subjects_of(spec, dtypes, seconds=seconds, **options)]
        described = {subject.spec: describe(subject) for subject in subjects}
        report = Report(profile, described, processes=int(option("numprocesses", None) or 1))
        return cls(
            subjects, contenders(option("--sda-policy"), seconds), clauses, report, tuple(option("--sda-report"))
        )

    @property
    def one_dtype_each(self) -> list[Subject]:
        """One subject a backend, float32 if it has it, for laws that do not depend on the dtype."""
        chosen: dict[str, Subject] = {}
        for subject in self.subjects:
            if subject.spec not in chosen or subject.dtype == "float32":
                chosen[subject.spec] = subject
        return list(chosen.values())

    def header(self) -> list[str]:
        """Return what is under test, for the header of the run."""
        versions = f"sparse_dlm_attn {sparse_dlm_attn.__version__}, specification {sparse_dlm_attn.SPEC_VERSION}"
        backends = (
            f"backend {spec}: " + "; ".join(f"{name} {value}" for name, value in facts.items())
            for spec, facts in self.report.backends.items()
        )
        policies = f"policies: {', '.join(map(str, self.contenders)) or 'none'}"
        return [f"{versions}, profile {self.report.profile}", *backends, policies]

    def result(self, item: pytest.Item, clauses: tuple[str, ...], report: pytest.TestReport, record: Record) -> Result:
        """Describe what one law did."""
        parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
        outcome, reason = report.outcome, ""
        if outcome == "skipped":
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        elif outcome == "failed":
            reason = str(report.longrepr).partition("\n")[0]
        return Result.of(
            item.name.partition("[")[0],
            clauses,
            parameters.get("subject"),
            parameters.get("policy", ""),
            "known failure" if outcome == "passed" and record.known else outcome,
            reason,
            examples=record.examples,
            seconds=round(report.duration, 3),
            refused=dict(record.refused),
            known=dict(record.known),
            features=dict(record.features),
        )

    def crash(self, report: pytest.TestReport) -> Result:
        """Describe a law in which the process of a worker ended: all that is known is its name."""
        path, _, item = report.nodeid.rpartition("::")
        law, _, parameters = item.partition("[")
        module = importlib.import_module(f"{__package__}.{Path(path).stem}")
        subject = next((each for each in self.subjects if str(each) in parameters), None)
        policy = next((each for each in self.contenders if str(each) in parameters), "")
        reason = "the code under test ended the process; the stack in the log shows where"
        return Result.of(law, clauses_of(getattr(module, law, None)), subject, policy, "failed", reason)

    def finish(self) -> list[str]:
        """Write the reports; return what went wrong beside the laws."""
        for path in self.paths:
            try:
                write_report(self.report, path)
            except DataFileError as error:
                self.problems.append(str(error))
        return [*self.problems, *self.report.idle_backends()]


def load_profile(config: pytest.Config) -> str:
    """Load the wanted profile, unless the user chose one of Hypothesis's own; return how the report names it."""
    register_profiles(config.getoption("--sda-database"))
    wanted, share = config.getoption("--sda-profile"), config.getoption("--sda-share")
    own = config.getoption("--hypothesis-profile", None)
    if wanted is None and own:
        return str(own)
    if not share > 0:
        raise InvalidArgumentError("--sda-share", "must be above 0", share)
    wanted = wanted or "quick"
    profile = settings.get_profile(f"sda-{wanted}")
    changes: dict[str, Any] = {"max_examples": max(1, round(profile.max_examples * share))}
    if config.getoption("--hypothesis-seed", None) is not None:
        changes["derandomize"] = False
    settings.register_profile("sda-wanted", profile, **changes)
    settings.load_profile("sda-wanted")
    return wanted if share == 1 else f"{wanted} x {share:g}"


def describe(subject: Subject) -> dict[str, Any]:
    """Return what a backend declares, as plain data."""
    if subject.instance is None:
        return {"did not load": subject.error}
    declared = {name: value for name, value in vars(subject.instance.capabilities).items() if value not in (None, "")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in declared.items()}


@dataclass(frozen=True)
class Finding:
    """A law that does not hold: its name, its clauses and what was found."""

    law: str
    clauses: tuple[str, ...]
    text: str


def laws(clauses: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield ``(name, law, fixed arguments)`` for every law of the given clauses or groups, but for its policy."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.name.startswith("test_"):
            continue
        for name, law in vars(importlib.import_module(f"{__package__}.{module.name}")).items():
            if name.startswith("test_") and hasattr(law, "body") and any(matches(c, clauses) for c in clauses_of(law)):
                marks = [mark.args for mark in law.pytestmark if mark.name == "parametrize"]
                for fixed in [{marks[0][0]: value} for value in marks[0][1]] if marks else [{}]:
                    yield f"{module.name}::{name}", law, fixed


def check_backend(
    backend: str | Backend,
    *,
    clauses: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    policies: tuple[Any, ...] = (),
    profile: str = "quick",
    first_only: bool = False,
    shrink: bool = True,
) -> list[Finding]:
    """Run the laws and return those that do not hold; an empty list is a proof, as far as it goes.

    Parameters
    ----------
    backend : str or Backend
        Name, ``"module:attr"`` or instance.
    clauses : tuple of str
        Clauses or groups to restrict the run to.
    dtypes : tuple of str
        Dtypes to test; default: all that the backend declares.
    policies : tuple
        Policies (or their names) for the laws of policies; none runs no such law.
    profile : str
        "quick", "ci" or "nightly".
    first_only : bool
        Whether to stop at the first law that does not hold.
    shrink : bool
        Whether to look for a smaller failing problem.

    Raises
    ------
    InvalidArgumentError
        If the backend does not load.
    UnknownNameError
        If there is no such backend, clause or policy.
    """
    from sparse_dlm_attn_conformance.checks import ConformanceFailure

    check_clauses(clauses, "clauses")
    register_profiles()
    instance = loaded(backend)
    spec = backend if isinstance(backend, str) else f"{type(backend).__module__}:{type(backend).__qualname__}"
    subjects = [Subject(spec, dtype, instance) for dtype in dtypes or instance.capabilities.dtypes]
    judged = [contender(policy) for policy in policies]
    token = OPTIONS.set(replace(OPTIONS.get(), shrink=shrink, profile=settings.get_profile(f"sda-{profile}")))
    findings: list[Finding] = []
    try:
        for name, law, fixed in laws(clauses):
            runs: list[tuple[Subject, dict[str, Any]]] = [(subject, fixed) for subject in subjects]
            if "policy" in law.__signature__.parameters:
                runs = [(subjects[0], {**fixed, "policy": policy}) for policy in judged]
            for subject, arguments in runs:
                try:
                    law(subject, **arguments)
                except pytest.skip.Exception:
                    continue
                except ConformanceFailure as failure:
                    findings.append(Finding(name, clauses_of(law), str(failure)))
                    if first_only:
                        return findings
    finally:
        OPTIONS.reset(token)
    return findings


def contender(policy: Any) -> Contender:
    """Return a policy, or its name, as a policy under test."""
    return Contender(policy if isinstance(policy, str) else repr(policy), get_policy(policy))


def loaded(backend: str | Backend) -> Backend:
    """Return the backend, or raise `InvalidArgumentError` with what kept it from loading."""
    instance, error = load_backend(backend)
    if instance is None:
        raise InvalidArgumentError("backend", "must load", error)
    return instance


def reproduce(backend: str | Backend, law: str, *, dtype: str, **arguments: Any) -> None:
    """Run one law on one problem, as the snippet of a failure says.

    Parameters
    ----------
    backend : str or Backend
        Name, ``"module:attr"`` or instance.
    law : str
        ``"module::function"``.
    dtype : str
        Dtype of q, K and V.
    **arguments
        The problem: what the law draws, and a policy where it takes one.

    Raises
    ------
    ConformanceFailure
        If the law does not hold.
    InvalidArgumentError
        If there is no such law, or the backend does not load.
    """
    found = {name: function for name, function, _ in laws()}
    if law not in found:
        raise InvalidArgumentError("law", "must be the name of a law, module::function", repr(law))
    if isinstance(arguments.get("policy"), str):
        arguments["policy"] = contender(arguments["policy"])
    instance = loaded(backend)
    found[law].body(Subject(backend if isinstance(backend, str) else instance.name, dtype, instance), **arguments)


def reproduce_denoising(backend: str | Backend, policy: str, *, dtype: str) -> Any:
    """Return the state machine over denoising, to take the steps that a failure prints.

    Parameters
    ----------
    backend : str or Backend
        Name, ``"module:attr"`` or instance.
    policy : str
        Policy by name, with its parameters.
    dtype : str
        Dtype of q, K and V.

    Raises
    ------
    InvalidArgumentError
        If the backend does not load.
    """
    from sparse_dlm_attn_conformance.test_denoising import Denoising

    instance = loaded(backend)
    subject = Subject(backend if isinstance(backend, str) else instance.name, dtype, instance)
    return type("Machine", (Denoising,), {"subject": subject, "policy": get_policy(policy)})()
