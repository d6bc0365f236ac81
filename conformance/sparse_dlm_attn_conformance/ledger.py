"""Known failures, as data that a backend's owner keeps: predicate, reason and link.

A ledger is a TOML file::

    [[known_failure]]
    law = "test_attend_pages_equals_the_reference"   # or: clause = "ATTEND-1"
    backend = "mine"                                  # optional, as are dtype and policy
    dtype = "float16"
    when = "head_dim > 64 and page_size == 1"         # optional: over the facts of the problem
    reason = "the last tile of wide heads is rounded twice"
    link = "https://example.org/issues/12"
    crash = false                                     # true: never run, because it takes the process down

Problems that match are allowed to fail, but at least one of them has to: an entry whose problems all
pass is out of date and fails the run (clause by clause, so nothing has to be disabled as a whole).
"""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn.errors import DataFileError

ALLOWED = (
    "Expression BoolOp And Or UnaryOp Not USub Compare Eq NotEq Lt LtE Gt GtE In NotIn Is IsNot BinOp Add Sub Mult Mod "
    "FloorDiv Name Load Constant Tuple List"
)
ALLOWED_NODES = tuple(getattr(ast, name) for name in ALLOWED.split())


@dataclass(frozen=True)
class KnownFailure:
    """One entry of a ledger, as above; "" is no restriction."""

    reason: str
    link: str
    law: str = ""
    clause: str = ""
    backend: str = ""
    dtype: str = ""
    policy: str = ""
    when: str = ""
    crash: bool = False

    def __post_init__(self) -> None:
        if not self.reason.strip() or not self.link.strip():
            raise InvalidArgumentError(
                "known_failure", "must have a reason and a link", f"reason {self.reason!r}, link {self.link!r}"
            )
        if not self.law and not self.clause:
            raise InvalidArgumentError("known_failure", "must name a law or a clause", "neither")
        if self.when:
            self._compiled()

    def _compiled(self) -> Any:
        try:
            tree = ast.parse(self.when, mode="eval")
        except SyntaxError as error:
            raise InvalidArgumentError("when", "must be an expression", repr(self.when)) from error
        for node in ast.walk(tree):
            if not isinstance(node, ALLOWED_NODES):
                raise InvalidArgumentError(
                    "when", "may only compare and combine facts of a problem", f"{type(node).__name__} in {self.when!r}"
                )
        return compile(tree, "<known_failure>", "eval")

    def concerns(self, law: str, clauses: tuple[str, ...], backend: str, dtype: str, policy: str) -> bool:
        """Return whether this entry is about a law run on a backend and dtype."""
        return (
            self.law in ("", law)
            and (not self.clause or self.clause in clauses)
            and self.backend in ("", backend)
            and self.dtype in ("", dtype)
            and self.policy in ("", policy)
        )

    def matches(self, facts: dict[str, Any]) -> bool:
        """Return whether a problem with these facts is expected to fail."""
        if not self.when:
            return True
        try:
            return bool(eval(self._compiled(), {"__builtins__": {}}, facts))
        except NameError:  # a law without this fact: the entry does not speak about it
            return False
        except Exception as error:
            raise InvalidArgumentError(
                "when",
                "must be computable from the facts of a problem",
                f"{self.when!r}: {type(error).__name__}: {error}",
            ) from error


@dataclass(frozen=True)
class Ledger:
    """Every known failure of a run."""

    entries: tuple[KnownFailure, ...] = field(default=())

    @classmethod
    def read(cls, path: str | Path) -> Ledger:
        """Read a ledger.

        Raises
        ------
        DataFileError
            If the file cannot be read or is not TOML.
        InvalidArgumentError
            If an entry breaks a rule; unknown keys are errors, so that a typing mistake shows.
        """
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DataFileError(f"known failures {str(path)!r} cannot be read: {error}") from error
        known = {item.name: item.type for item in fields(KnownFailure)}
        entries = data.pop("known_failure", [])
        if data or not isinstance(entries, list):
            raise InvalidArgumentError(
                "known failures", "must hold [[known_failure]] tables only", ", ".join(data) or "a table"
            )
        for entry in entries:
            unknown = sorted(set(entry) - set(known))
            if unknown:
                raise InvalidArgumentError("known_failure", f"may have the keys {', '.join(known)}", ", ".join(unknown))
            wrong = [key for key, value in entry.items() if type(value).__name__ != known[key]]
            if wrong or "reason" not in entry or "link" not in entry:
                raise InvalidArgumentError(
                    "known_failure", "must have a reason, a link, and texts (crash: true or false)", entry
                )
        return cls(tuple(KnownFailure(**entry) for entry in entries))

    def concerning(
        self, law: str, clauses: tuple[str, ...], backend: str, dtype: str, policy: str
    ) -> tuple[KnownFailure, ...]:
        """Return the entries about one law on one backend and dtype."""
        return tuple(e for e in self.entries if e.concerns(law, clauses, backend, dtype, policy))
