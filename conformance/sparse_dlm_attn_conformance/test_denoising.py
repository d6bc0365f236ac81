"""A state machine over denoising: passes, save pass, growing prefix, dropped and foreign memory.

The backend and policy under test run beside the reference, which is assumed to be right. Every
decision must be the same and every output within the budget, in whatever order things happen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import errors as hypothesis_errors
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from sparse_dlm_attn import PassInfo, PrefixAttention, PrefixAttentionPolicy, StaleMemoryError
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn_conformance.cases import EXACT, Arrays, Case, Host
from sparse_dlm_attn_conformance.checks import ConformanceFailure, expect, expect_close, expect_same_bits
from sparse_dlm_attn_conformance.contenders import Contender
from sparse_dlm_attn_conformance.doubles import Grid
from sparse_dlm_attn_conformance.episodes import rows_of
from sparse_dlm_attn_conformance.guards import TimeLimitExceeded, last_resort, time_limit
from sparse_dlm_attn_conformance.laws import (
    OPTIONS,
    RECORD,
    NothingDeclared,
    Record,
    clauses_of,
    foreign,
    is_ours,
    law_settings,
    refuse_undeclared,
    require_loaded,
    skip_if_nothing_ran,
)
from sparse_dlm_attn_conformance.strategies import cases, within
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.test_policies import output_budget
from sparse_dlm_attn_reference import ReferenceBackend


class Side:
    """One of the two that run: its driver and what it remembers."""

    def __init__(self, subject: Subject, policy: PrefixAttentionPolicy[Any]) -> None:
        self.subject = subject.using(Grid(subject.backend))
        self.policy = policy
        self.driver = PrefixAttention(policy, self.subject.backend)
        self.memory: LayerMemory | None = None

    def run(self, arrays: Arrays, number: int, info: dict[str, Any], version: int) -> tuple[Host, LayerMemory]:
        """Run one pass without keeping its memory."""
        on = self.subject.load(arrays)
        rows = {name: self.subject.ints(info[name]) for name in ("decoded", "newly_decoded")}
        rest = {name: value for name, value in info.items() if name not in rows}
        out, memory = self.driver(
            on.q,
            on.k,
            on.v,
            replace(on.context, version=version),
            self.memory,
            PassInfo(number, **rows, **rest),
            scale=arrays.scale,
        )
        return host(out), memory


class Denoising(RuleBasedStateMachine):
    """Denoising of one layer, step by step; subclass it with `subject` and `policy` set."""

    subject: Subject
    policy: PrefixAttentionPolicy[Any]

    def __init__(self) -> None:
        super().__init__()
        self.arrays: Arrays | None = None

    @initialize(
        case=cases(regimes=EXACT, max_batch=2, heads=("one",), layouts=("plain",), selects=False),
        spare=st.integers(0, 3),
    )
    def begin(self, case: Case, spare: int) -> None:
        """Begin with a context that has room for ``spare`` more pages."""
        refuse_undeclared(self.subject, case, RECORD.get())
        arrays = case.arrays(self.subject.dtype)
        self.case, self.version, self.number = case, 0, 0
        self.arrays = with_room(arrays, spare, case.num_pages)
        self.decoded = np.zeros(arrays.active.shape, dtype=bool)
        reference = Subject("reference", "float64", ReferenceBackend())
        self.sides = (Side(self.subject, self.policy), Side(reference, self.policy))

    @precondition(lambda self: self.arrays is not None)
    @rule(
        moved=st.integers(0, 2**17 - 1), newly=st.integers(0, 2**17 - 1), seed=st.integers(0, 99), saves=st.booleans()
    )
    def denoise(self, moved: int, newly: int, seed: int, saves: bool) -> None:
        """Run the next pass; some queries have moved, some tokens were decoded."""
        arrays = self.here()
        rows = bits(moved, arrays.q.shape[2])
        fresh = self.case.fresh(self.subject.dtype, 1000 + seed, self.case.q_heads)
        arrays = arrays.but(q=np.where(rows[None, None, :, None], fresh, arrays.q))
        now = np.broadcast_to(bits(newly, arrays.q.shape[2]), self.decoded.shape) & ~self.decoded
        self.decoded = self.decoded | now
        info = {"is_save": saves, "decoded": self.decoded, "newly_decoded": np.ascontiguousarray(now)}
        (mine, kept), (theirs, model) = (self.limited(side, arrays, info) for side in self.sides)
        expect_same_bits(host(kept.active), host(model.active), f"active rows of pass {self.number}", "POLICY-1")
        expect_same_bits(rows_of(arrays, kept), rows_of(arrays, model), f"pages of pass {self.number}", "POLICY-1")
        expect_close(mine, theirs, output_budget(arrays), f"out of pass {self.number}", "ACCURACY-2")
        expect_close(host(kept.traffic.density), host(model.traffic.density), 1e-6, "density", "DENSITY-1")
        self.sides[0].memory, self.sides[1].memory = kept, model
        self.arrays, self.number = arrays, self.number + 1

    @precondition(lambda self: self.arrays is not None and self.number > 0)
    @rule(seed=st.integers(0, 99), keep=st.booleans())
    def next_block(self, seed: int, keep: bool) -> None:
        """End the block: its keys join the context, the version changes, a new block begins."""
        arrays = self.here()
        later = replace(self.case, seed=2000 + seed).arrays(self.subject.dtype)
        self.arrays = appended(arrays).but(q=later.q, k=later.k, v=later.v)
        self.version, self.number = self.version + 1, 0
        self.decoded = np.zeros_like(self.decoded)
        if not keep:
            self.drop()

    @precondition(lambda self: self.arrays is not None and self.number > 0)
    @rule()
    def drop_memory(self) -> None:
        """Lose the memory in the middle of a block: the next pass restarts it."""
        self.drop()

    @precondition(lambda self: self.arrays is not None and self.number > 0 and self.sides[0].memory is not None)
    @rule(what=st.sampled_from(("version", "layer", "lengths")))
    def use_stale_memory(self, what: str) -> None:
        """Use memory where it no longer holds: refused on both sides, and nothing changes."""
        arrays, version = self.here(), self.version
        info: dict[str, Any] = {"decoded": self.decoded, "newly_decoded": self.decoded, "num_layers": 3}
        if what == "version":
            version += 1
        elif what == "layer":
            info["layer"] = 2
        else:
            lengths = np.where(arrays.page_lengths > 0, arrays.page_lengths - 1, 0).astype(np.int32)
            if (lengths == arrays.page_lengths).all():
                return
            arrays = arrays.but(page_lengths=lengths)
        for side in self.sides:
            if what == "lengths" and side.subject.device_kind != "cpu":
                continue  # reading them would make the pass wait for the device (SYNC-1)
            before = host(side.memory.state.out) if side.memory is not None else None
            try:
                side.run(arrays, self.number, info, version)
            except StaleMemoryError:
                pass
            else:
                expect(False, "MEMORY-2", f"memory used with another {what} must raise StaleMemoryError")
            if before is not None and side.memory is not None:
                expect_same_bits(host(side.memory.state.out), before, "memory after a refusal", "MEMORY-2")

    def here(self) -> Arrays:
        """Return the values of the running block."""
        assert self.arrays is not None
        return self.arrays

    def drop(self) -> None:
        """Forget what both sides remember."""
        for side in self.sides:
            side.memory = None

    def limited(self, side: Side, arrays: Arrays, info: dict[str, Any]) -> tuple[Host, LayerMemory]:
        """Run a pass under the time limit."""
        record = RECORD.get()
        if record is not None:
            record.examples += 1
        with time_limit(OPTIONS.get().seconds, f"pass {self.number} on {side.subject}"):
            return side.run(arrays, self.number, info, self.version)


def bits(number: int, width: int) -> Host:
    """Return the lowest ``width`` bits as a bool row."""
    return np.asarray((number >> np.arange(width)) & 1, dtype=bool)


def with_room(arrays: Arrays, spare: int, used: int) -> Arrays:
    """Return the same context with ``spare`` absent pages at its end, and physical pages for them."""
    batch, pages = arrays.page_lengths.shape
    pool = (batch * spare, *arrays.k_pages.shape[1:])
    unwritten = np.full(pool, np.nan)
    table = used + np.arange(batch * spare, dtype=np.int32).reshape(batch, spare)
    segments = arrays.page_segments
    return arrays.but(
        k_pages=np.concatenate([arrays.k_pages, unwritten]),
        v_pages=np.concatenate([arrays.v_pages, unwritten]),
        page_table=np.concatenate([arrays.page_table, table], axis=1),
        page_lengths=np.concatenate([arrays.page_lengths, np.zeros((batch, spare), np.int32)], axis=1),
        page_segments=None
        if segments is None
        else np.concatenate([segments, np.ones((batch, spare), np.int8)], axis=1),
        mask=np.zeros((*arrays.mask.shape[:3], pages + spare), dtype=bool),
    )


def appended(arrays: Arrays) -> Arrays:
    """Return the context with as many of the block's tokens as fit into its next absent page."""
    k_pages, v_pages, lengths = arrays.k_pages.copy(), arrays.v_pages.copy(), arrays.page_lengths.copy()
    owners = np.bincount(np.clip(arrays.page_table[lengths > 0], 0, None), minlength=len(k_pages))
    for b, row in enumerate(lengths):
        free = [
            page
            for page in np.flatnonzero(row == 0)
            if 0 <= arrays.page_table[b, page] < len(k_pages) and not owners[arrays.page_table[b, page]]
        ]
        if not free:
            continue
        count, where = min(arrays.page_size, arrays.k.shape[2]), arrays.page_table[b, free[0]]
        k_pages[where, :, :count], v_pages[where, :, :count] = arrays.k[b, :, :count], arrays.v[b, :, :count]
        lengths[b, free[0]] = count
        owners[where] = 1
    return arrays.but(k_pages=k_pages, v_pages=v_pages, page_lengths=lengths)


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
