"""Known failures: predicates over problems, with a reason; an entry that no longer fails is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState, InvalidArgumentError
from sparse_dlm_attn.errors import DataFileError
from sparse_dlm_attn_conformance import check_backend
from sparse_dlm_attn_conformance.laws import OPTIONS
from sparse_dlm_attn_conformance.ledger import KnownFailure, Ledger
from sparse_dlm_attn_reference import ReferenceBackend

ENTRY = {"reason": "rounded twice", "link": "https://example.org/issues/1"}


class WrongForGroups(ReferenceBackend):
    name: ClassVar[str] = "wrong-for-groups"

    def attend_block(self, q: Any, k: Any, v: Any, *, scale: float | None = None) -> AttentionState:
        state = super().attend_block(q, k, v, scale=scale)
        wrong = q.shape[1] > k.shape[1]
        return AttentionState(np.full_like(state.out, 7) if wrong else state.out, state.lse)


@contextmanager
def ledger(*entries: KnownFailure) -> Iterator[None]:
    token = OPTIONS.set(replace(OPTIONS.get(), ledger=Ledger(entries)))
    try:
        yield
    finally:
        OPTIONS.reset(token)


def block_findings(backend: ReferenceBackend) -> list[str]:
    found = check_backend(backend, clauses=("BLOCK-1",), dtypes=("float32",), profile="ci", shrink=False)
    return [f"{finding.law}: {finding.text}" for finding in found]


def test_problems_of_an_entry_may_fail_and_others_may_not() -> None:
    assert block_findings(WrongForGroups())
    with ledger(KnownFailure(**ENTRY, clause="BLOCK-1", when="group > 1")):
        assert block_findings(WrongForGroups()) == []
    with ledger(KnownFailure(**ENTRY, clause="BLOCK-1", when="group > 1 and head_dim == 1234")):
        assert block_findings(WrongForGroups())


def test_an_entry_whose_problems_all_pass_fails_the_run() -> None:
    with ledger(KnownFailure(**ENTRY, clause="BLOCK-1", when="group == 2")):
        found = block_findings(ReferenceBackend())
    assert found and all("remove its entry" in text for text in found)


def test_a_crash_entry_is_never_run() -> None:
    class Crashes(ReferenceBackend):
        def attend_block(self, q: Any, k: Any, v: Any, *, scale: float | None = None) -> AttentionState:
            assert q.shape[1] // k.shape[1] != 7, "this would take the process down"
            return super().attend_block(q, k, v, scale=scale)

    with ledger(KnownFailure(**ENTRY, clause="BLOCK-1", when="group == 7", crash=True)):
        assert block_findings(Crashes()) == []


def test_an_entry_for_another_backend_or_dtype_does_not_count() -> None:
    for other in ({"dtype": "float16"}, {"backend": "another"}, {"law": "test_something_else", "clause": ""}):
        with ledger(KnownFailure(**{**ENTRY, "clause": "BLOCK-1", "when": "group > 1", **other})):
            assert block_findings(WrongForGroups())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[known_failure]]\nlaw = 'x'\nreason = ''\nlink = 'y'", "reason and a link"),
        ("[[known_failure]]\nreason = 'x'\nlink = 'y'", "law or a clause"),
        ("[[known_failure]]\nlaw = 'x'\nlink = 'y'", "reason"),
        ("[[known_failure]]\nlaw = 'x'\nreason = 'r'\nlink = 'y'\nwhere = 'z'", "where"),
        ("[[known_failure]]\nlaw = 'x'\nreason = 'r'\nlink = 'y'\ncrash = 'yes'", "crash"),
        ("[[known_failure]]\nlaw = 'x'\nreason = 'r'\nlink = 'y'\nwhen = 'group =='", "expression"),
        ("[[known_failure]]\nlaw = 'x'\nreason = 'r'\nlink = 'y'\nwhen = '__import__(\"os\")'", "compare"),
        ("[[known_failure]]\nlaw = 'x'\nreason = 'r'\nlink = 'y'\nwhen = 'group.__class__'", "compare"),
        ("other = 1", "known_failure"),
    ],
)
def test_a_ledger_that_breaks_a_rule_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "known.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=message):
        Ledger.read(path)


def test_a_ledger_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"\xff\xfe[[")
    for path in (tmp_path / "missing.toml", bad, tmp_path):
        with pytest.raises(DataFileError, match="known failures"):
            Ledger.read(path)
