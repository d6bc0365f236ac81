"""What a run found, as terminal lines, JSON and a Markdown matrix."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import sparse_dlm_attn
from sparse_dlm_attn.files import write_atomically
from sparse_dlm_attn_conformance.clauses import CLAUSES

GATES = ("test_the_backend_loads", "test_the_policy_loads")
"""Laws that run whatever was asked for, because they say why the others are skipped."""

ORDER = ("failed", "known failure", "passed", "skipped")
SIGNS = {"failed": "FAIL", "known failure": "known", "passed": "ok", "skipped": "skip"}


@dataclass(frozen=True)
class Result:
    """One law on one backend and dtype (and policy)."""

    law: str
    clauses: tuple[str, ...]
    backend: str
    dtype: str
    policy: str
    outcome: str
    reason: str = ""
    examples: int = 0
    seconds: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    features: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, law: str, clauses: tuple[str, ...], subject: Any, policy: Any, outcome: str, reason: str, **more: Any
    ) -> Result:
        """Describe a law on a subject, if any, and a policy, if any."""
        backend, dtype = (subject.spec, subject.dtype) if subject else ("", "any")
        return cls(law, clauses, backend, dtype, str(policy), outcome, reason, **more)


@dataclass
class Report:
    """All results of a run: one for each law, backend, dtype and policy."""

    profile: str
    backends: dict[str, dict[str, Any]]  # what each declares, or why it did not load
    results: list[Result] = field(default_factory=list)
    processes: int = 1

    def add(self, result: Any) -> None:
        """Add a result that travelled as plain data, if it is one."""
        if isinstance(result, dict):
            self.results.append(Result(**{**result, "clauses": tuple(result["clauses"])}))

    def matrix(self) -> dict[str, dict[str, str]]:
        """Return the worst outcome that says something, by clause and by ``"backend dtype"``."""
        cells: dict[str, dict[str, set[str]]] = {}
        for result in self.results:
            for clause in result.clauses:
                column = f"{result.backend} {result.dtype}"
                cells.setdefault(clause, {}).setdefault(column, set()).add(result.outcome)
        return {
            clause: {column: next(name for name in ORDER if name in found) for column, found in row.items()}
            for clause, row in sorted(cells.items(), key=lambda item: _position(item[0]))
        }

    def idle_backends(self) -> list[str]:
        """Return the backends on which no law ran, but for those that say whether something loads."""
        busy = {r.backend for r in self.results if r.outcome != "skipped" and r.law not in GATES}
        return [name for name in self.backends if name not in busy]

    def counts(self) -> Counter[str]:
        """Return how many laws had each outcome."""
        return Counter(result.outcome for result in self.results)

    def lines(self) -> list[str]:
        """Return the summary for a terminal."""
        lines = [f"profile {self.profile} in {self.processes} process{'es' if self.processes > 1 else ''}"]
        for name, facts in self.backends.items():
            if "did not load" in facts:
                lines.append(f"{name} did not load: {facts['did not load']}")
            own = [result for result in self.results if result.backend == name]
            counts = Counter(result.outcome for result in own)
            problems = sum(result.examples for result in own)
            shown = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ORDER if counts[outcome])
            lines.append(f"{name}: {shown or 'nothing ran'}; {problems} problems")
            failing = sorted({c for r in own if r.outcome == "failed" for c in r.clauses}, key=_position)
            if failing:
                lines.append(f"  clauses with a failing law: {', '.join(failing)}")
            lines += [
                f"  known failure: {reason} ({count} problems)"
                for reason, count in sum_counts(result.known for result in own).items()
            ]
            lines += [f"  skipped {count}: {reason}" for reason, count in self._skipped(own)]
        covered = sum_counts(result.features for result in self.results)
        if covered:
            lines.append("problems covered: " + ", ".join(f"{name} {n}" for name, n in covered.most_common()))
        lines += [f"{name}: no law ran, so nothing is proven" for name in self.idle_backends()]
        return lines

    @staticmethod
    def _skipped(results: list[Result]) -> list[tuple[str, int]]:
        return Counter(result.reason for result in results if result.outcome == "skipped").most_common()

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "format": 1,
            "specification": sparse_dlm_attn.SPEC_VERSION,
            "versions": {
                "sparse_dlm_attn": sparse_dlm_attn.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "machine": platform.machine(),
                "system": platform.system(),
            },
            "profile": self.profile,
            "processes": self.processes,
            "backends": self.backends,
            "counts": dict(self.counts()),
            "nothing_ran_on": self.idle_backends(),
            "matrix": self.matrix(),
            "results": [asdict(result) for result in self.results],
        }

    def as_markdown(self) -> str:
        """Return the matrix of clauses by backend and dtype."""
        matrix = self.matrix()
        columns = sorted({column for row in matrix.values() for column in row})
        lines = [
            "# Conformance matrix",
            "",
            f"Specification {sparse_dlm_attn.SPEC_VERSION}, sparse_dlm_attn {sparse_dlm_attn.__version__}, "
            f"profile `{self.profile}`, Python {platform.python_version()}, NumPy {np.__version__}, "
            f"{platform.system()} {platform.machine()}, {date.today()}.",
            "",
            "Written by `sparse-dlm-attn conformance "
            + " ".join(f"--backend {name}" for name in self.backends)
            + f" --profile {self.profile.replace(' x ', ' --share ')} --workers {self.processes} "
            "--report FILE.md`. Laws of policies "
            "and of rankings run in one dtype, since nothing in them depends on it.",
            "",
            "| clause | says | " + " | ".join(columns) + " |",
            "|---|---|" + "---|" * len(columns),
        ]
        for clause, row in matrix.items():
            cells = [SIGNS[row[column]] if column in row else "" for column in columns]
            lines.append(f"| {clause} | {CLAUSES.get(clause, '')} | " + " | ".join(cells) + " |")
        lines += ["", "`ok` held, `known` fails as the ledger says, `skip` not declared, `FAIL` broken.", ""]
        for name in self.backends:
            own = [result for result in self.results if result.backend == name]
            for reason, count in self._skipped(own):
                lines.append(f"- {name}: {count} laws skipped: {reason}")
        return "\n".join(lines).rstrip() + "\n"


def _position(clause: str) -> int:
    """Return the place of a clause in the specification; unknown ones come last."""
    names = list(CLAUSES)
    return names.index(clause) if clause in CLAUSES else len(names)


def sum_counts(parts: Iterable[dict[str, int]]) -> Counter[str]:
    """Add up counts."""
    return sum(map(Counter, parts), Counter())


def write_report(report: Report, path: str | Path) -> None:
    """Write a report: Markdown for ``.md``, else JSON; all of it or, on an error, nothing.

    Raises
    ------
    DataFileError
        If the file cannot be written.
    """
    target = Path(path)
    text = report.as_markdown() if target.suffix == ".md" else json.dumps(report.as_dict(), indent=1) + "\n"
    write_atomically(target, text.encode(), "--sda-report")
