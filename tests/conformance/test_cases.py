"""The generated problems are legal, cover what they promise, and shrink to something readable."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn_conformance.cases import REGIMES, Case, fill, round_to
from sparse_dlm_attn_conformance.episodes import Episode, episodes
from sparse_dlm_attn_conformance.laws import OPTIONS, LawOptions, law
from sparse_dlm_attn_conformance.run import register_profiles
from sparse_dlm_attn_conformance.strategies import cases, change_tables, merge_tables, score_tables, within
from sparse_dlm_attn_conformance.subjects import Subject
from sparse_dlm_attn_reference import ReferenceBackend

CALM = settings(
    deadline=None, max_examples=150, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@CALM
@given(case=cases())
def test_every_generated_problem_is_legal(case: Case) -> None:
    arrays = case.arrays("float32")
    context = arrays.context()
    context.check_contents()
    arrays.selection().check_fits(arrays.q.shape, context)
    assert arrays.q[0].size <= 8192
    assert np.isfinite(arrays.q).all() and np.isfinite(arrays.k).all()
    assert np.isfinite(arrays.k_pages[arrays.stored()]).all()
    assert arrays.active.shape == (case.batch, case.tokens)


def test_a_hundred_problems_cover_every_feature() -> None:
    seen: Counter[str] = Counter()

    @settings(CALM, max_examples=400)
    @given(case=cases())
    def draw(case: Case) -> None:
        seen.update(case.features())

    draw()
    promised = {f"regime {name}" for name in REGIMES} | {f"group {group}" for group in (1, 2, 4, 7)}
    promised |= {"page size 1", "page size not a power of two", "ragged batch", "empty context", "absent page"}
    promised |= {"partial page", "no active row", "all rows active", "nothing selected", "segments"}
    promised |= {"poison nan", "poison inf", "layout gapped", "layout token_major", "explicit scale"}
    assert promised <= set(seen)


def test_a_failing_problem_shrinks_to_a_small_one() -> None:
    small = find(cases(), lambda case: case.tokens >= 3 and "partial page" in case.features(), settings=CALM)
    assert (small.batch, small.kv_heads, small.group, small.tokens) == (1, 1, 1, 3)
    assert small.pages <= 2 and small.regime == "dyadic" and small.seed == 0
    assert len(repr(small)) < 120


def test_a_problem_prints_as_code_that_makes_it_again() -> None:
    case = find(cases(), lambda case: case.segments is not None, settings=CALM)
    assert eval(repr(case), {"Case": Case}) == case


def test_problems_stay_within_what_a_backend_declares() -> None:
    declared = Capabilities(head_dims=(64,), page_sizes=(16, 32), groups=(4,), max_block_length=8)

    @settings(CALM, max_examples=40)
    @given(case=cases())
    def draw(case: Case) -> None:
        assert declared.why_not(case.problem("float32")) == []

    with within(declared):
        draw()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_rounding_is_to_nearest_and_idempotent(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    rounded = round_to(values, dtype)
    bits = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[dtype]
    assert (round_to(rounded, dtype) == rounded).all()
    assert np.abs(rounded / values - 1).max() <= 2.0 ** -(bits + 1)
    assert np.isnan(round_to(np.asarray([math.nan]), dtype)).all()
    assert round_to(np.asarray([math.inf, -math.inf]), dtype).tolist() == [math.inf, -math.inf]


def test_bfloat16_rounding_agrees_with_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float64).numpy()
    assert (round_to(values.astype(np.float64), "bfloat16") == expected).all()


def test_sums_on_the_dyadic_grid_are_exact_in_any_order() -> None:
    rng = np.random.default_rng(0)
    q, k = (fill(rng, "dyadic", (96,)).astype(np.float32) for _ in range(2))
    exact = sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(q, k, strict=True)), Fraction(0))
    for order in (np.arange(96), rng.permutation(96), rng.permutation(96)):
        total = np.float32(0)
        for a, b in zip(q[order], k[order], strict=True):
            total = np.float32(total + a * b)
        assert Fraction(float(total)) == exact


@CALM
@given(table=score_tables(), changes=change_tables(special=True), merge=merge_tables())
def test_tables_have_the_shapes_they_say(table: object, changes: object, merge: object) -> None:
    assert table.scores().shape == (*table.lead, table.pages)  # type: ignore[attr-defined]
    np.broadcast_to(table.mask(), table.scores().shape)  # type: ignore[attr-defined]
    assert changes.change().shape[0] == changes.batch  # type: ignore[attr-defined]
    for state in merge.states("float32"):  # type: ignore[attr-defined]
        assert ((state.out == 0).all(axis=3) | np.isfinite(state.lse)).all()


@settings(CALM, max_examples=40)
@given(episode=episodes(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_queries_of_rows_that_did_not_move_stay(episode: Episode, dtype: str) -> None:
    queries = episode.queries(dtype)
    assert len(queries) == episode.passes
    for number in range(1, episode.passes):
        still = ~episode.moved(number)[:, None, :]
        same = (queries[number] == queries[number - 1]).all(axis=3)
        assert same[np.broadcast_to(still, same.shape)].all()


def test_one_kernel_under_two_names_and_dtypes_meets_the_same_problems() -> None:
    met: dict[str, list[str]] = {}

    @law(case=cases())
    def test_that_notes_its_problems(subject: Subject, case: Case) -> None:
        met.setdefault(str(subject), []).append(repr(case))

    register_profiles()
    token = OPTIONS.set(LawOptions(profile=settings.get_profile("sda-quick")))
    for name, dtype in (("one", "float32"), ("another", "float32"), ("one", "float16")):
        test_that_notes_its_problems(Subject(name, dtype, ReferenceBackend()))
    OPTIONS.reset(token)
    assert len(met) == 3 and met["one-float32"] == met["another-float32"] == met["one-float16"]
    assert len(set(met["one-float32"])) > 1
