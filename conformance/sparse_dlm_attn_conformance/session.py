"""One conformance run: what is under test, how thoroughly, and what was found."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

import sparse_dlm_attn
from sparse_dlm_attn import InvalidArgumentError, UnknownNameError
from sparse_dlm_attn.errors import DataFileError
from sparse_dlm_attn_conformance.clauses import check_clauses, matches
from sparse_dlm_attn_conformance.contenders import Contender, contenders
from sparse_dlm_attn_conformance.laws import CALM, OPTIONS, LawOptions, Record, clauses_of
from sparse_dlm_attn_conformance.ledger import Ledger
from sparse_dlm_attn_conformance.report import Report, Result, write_report
from sparse_dlm_attn_conformance.subjects import DTYPES, Subject, load_backend

__all__ = ["PROFILES", "ConformanceSession", "register_profiles", "subjects_of"]

PROFILES = {"quick": 10, "ci": 40, "nightly": 2000}
"""Problems that a law gets, by profile."""


def register_profiles(database: str = ".hypothesis/sda-nightly") -> None:
    """Register the Hypothesis profiles ``sda-quick``, ``sda-ci`` and ``sda-nightly``.

    The nightly one stores failing problems in ``database``, so that the next night replays them;
    the others store nothing and repeat the same problems unless a seed is given.
    """
    common: dict[str, Any] = {"deadline": None, "suppress_health_check": CALM, "print_blob": False}
    for name in ("quick", "ci"):
        settings.register_profile(
            f"sda-{name}",
            settings.get_profile("default"),
            max_examples=PROFILES[name],
            database=None,
            derandomize=True,
            stateful_step_count=12,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            **common,
        )
    settings.register_profile(
        "sda-nightly",
        settings.get_profile("default"),
        max_examples=PROFILES["nightly"],
        derandomize=False,
        database=DirectoryBasedExampleDatabase(database),
        stateful_step_count=40,
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
        **common,
    )


def subjects_of(
    spec: str, dtypes: tuple[str, ...] = (), *, seconds: float = 120.0, **options: Any
) -> list[Subject]:
    """Return a subject for each wanted dtype that a backend declares; one that says why if it has none."""
    backend, error = load_backend(spec, seconds=seconds, **options)
    if backend is None:
        return [Subject(spec, "any", None, error)]
    declared = [name for name in DTYPES if name in backend.capabilities.dtypes]
    chosen = [name for name in declared if not dtypes or name in dtypes]
    if not chosen:
        wanted = f"none of {', '.join(dtypes)} is among the declared dtypes {', '.join(declared)}"
        return [Subject(spec, "any", None, wanted)]
    return [Subject(spec, name, backend) for name in chosen]


@dataclass
class ConformanceSession:
    """State of one run.

    Parameters
    ----------
    subjects : list of Subject
        Every backend and dtype.
    contenders : list of Contender
        Every policy.
    clauses : tuple of str
        Clauses or groups to restrict the run to.
    report : Report
        What was found.
    paths : tuple of str
        Where to write reports.
    problems : list of str
        What went wrong beside the laws.
    """

    subjects: list[Subject]
    contenders: list[Contender]
    clauses: tuple[str, ...]
    report: Report
    paths: tuple[str, ...]
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of_config(cls, config: pytest.Config) -> ConformanceSession:
        """Build the session that pytest's options describe, and load its profile."""
        option = config.getoption
        # The command, which alone wants to know that the run has finished, calls its options so.
        prefix = "--" if option("--sda-finished") else "--sda-"
        clauses = tuple(option("--sda-clause"))
        check_clauses(clauses, f"{prefix}clause")
        for dtype in option("--sda-dtype"):
            if dtype not in DTYPES:
                raise UnknownNameError(f"dtype in {prefix}dtype", dtype, DTYPES)
        ledger = option("--sda-known-failures")
        OPTIONS.set(LawOptions(Ledger.read(ledger) if ledger else Ledger(), option("--sda-seconds")))
        profile = load_profile(config)
        device = option("--sda-device")
        options = {} if device is None else {"device": device}
        subjects = [
            subject
            for spec in dict.fromkeys(option("--sda-backend"))
            for subject in subjects_of(
                spec, tuple(option("--sda-dtype")), seconds=option("--sda-seconds"), **options
            )
        ]
        described = {subject.spec: describe(subject) for subject in subjects}
        return cls(
            subjects,
            contenders(option("--sda-policy"), option("--sda-seconds")),
            clauses,
            Report(profile, described, processes=int(option("numprocesses", None) or 1)),
            tuple(option("--sda-report")),
        )

    @property
    def one_dtype_each(self) -> list[Subject]:
        """One subject a backend, float32 if it has it, for laws that do not depend on the dtype."""
        chosen: dict[str, Subject] = {}
        for subject in self.subjects:
            if subject.spec not in chosen or subject.dtype == "float32":
                chosen[subject.spec] = subject
        return list(chosen.values())

    def wants(self, clauses: tuple[str, ...]) -> bool:
        """Return whether a law with these clauses belongs to the run."""
        return not self.clauses or any(matches(clause, self.clauses) for clause in clauses)

    def header(self) -> list[str]:
        """Return what is under test, for the header of the run."""
        lines = [
            f"sparse_dlm_attn {sparse_dlm_attn.__version__}, specification {sparse_dlm_attn.SPEC_VERSION}, "
            f"profile {self.report.profile}"
        ]
        for spec, facts in self.report.backends.items():
            lines.append(f"backend {spec}: " + "; ".join(f"{name} {value}" for name, value in facts.items()))
        lines.append(f"policies: {', '.join(map(str, self.contenders)) or 'none'}")
        return lines

    def result(
        self, item: pytest.Item, clauses: tuple[str, ...], report: pytest.TestReport, record: Record | None
    ) -> Result:
        """Describe what one law did."""
        parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
        subject: Subject | None = parameters.get("subject")
        record = record or Record()
        outcome, reason = report.outcome, ""
        if outcome == "skipped":
            reason = (
                report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
            )
        elif outcome == "failed":
            reason = str(report.longrepr).partition("\n")[0]
        elif record.known:
            outcome = "known failure"  # type: ignore[assignment]
        return Result(
            law=item.name.partition("[")[0],
            clauses=clauses,
            backend=subject.spec if subject else "",
            dtype=subject.dtype if subject else "any",
            policy=str(parameters.get("policy", "")),
            outcome=outcome,
            reason=reason,
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
        policy = next((str(each) for each in self.contenders if str(each) in parameters), "")
        return Result(
            law=law,
            clauses=clauses_of(getattr(module, law, None)),
            backend=subject.spec if subject else "",
            dtype=subject.dtype if subject else "any",
            policy=policy,
            outcome="failed",
            reason="the code under test ended the process; the stack in the log shows where",
        )

    def collect(self, data: dict[str, Any]) -> None:
        """Add a result."""
        self.report.results.append(Result.of_dict(data))

    def finish(self) -> list[str]:
        """Write the reports; return what went wrong beside the laws."""
        self.problems += [f"{name}: no law ran" for name in self.report.idle_backends()]
        for path in self.paths:
            try:
                write_report(self.report, path)
            except DataFileError as error:
                self.problems.append(str(error))
        return self.problems

    def summary(self) -> list[str]:
        """Return the lines of the terminal summary."""
        problems = [problem for problem in self.problems if not problem.endswith("no law ran")]
        return self.report.lines() + problems


def load_profile(config: pytest.Config) -> str:
    """Load the wanted profile, unless the user chose one of Hypothesis's own."""
    register_profiles(config.getoption("--sda-database"))
    wanted = config.getoption("--sda-profile")
    own = config.getoption("--hypothesis-profile", None)
    if wanted is None and own:
        return str(own)
    changes: dict[str, Any] = {}
    if config.getoption("--hypothesis-seed", None) is not None:
        changes["derandomize"] = False
    share = config.getoption("--sda-share")
    if not share > 0:
        raise InvalidArgumentError("--sda-share", "must be above 0", share)
    profile = settings.get_profile(f"sda-{wanted or 'quick'}")
    if share != 1:
        changes["max_examples"] = max(1, round(profile.max_examples * share))
    settings.register_profile("sda-wanted", profile, **changes)
    settings.load_profile("sda-wanted")
    return f"{wanted or 'quick'}{'' if share == 1 else f' x {share:g}'}"


def describe(subject: Subject) -> dict[str, Any]:
    """Return what a backend declares, as plain data."""
    if subject.instance is None:
        return {"did not load": subject.error}
    declared = vars(subject.instance.capabilities)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in declared.items()
        if value not in (None, "")
    }
