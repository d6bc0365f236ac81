"""The Triton backend under the conformance laws, on problems of one awkwardness each."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs PyTorch")
pytest.importorskip("triton", reason="the Triton backend needs Triton")

import sparse_dlm_attn_triton  # noqa: E402
from sparse_dlm_attn_conformance import test_attention, test_decisions, test_pass, test_ranked  # noqa: E402
from sparse_dlm_attn_conformance.cases import Case  # noqa: E402
from sparse_dlm_attn_conformance.subjects import Subject  # noqa: E402
from sparse_dlm_attn_conformance.tables import RankedRule  # noqa: E402
from sparse_dlm_attn_triton import TritonBackend  # noqa: E402

# The interpreter computes with NumPy, which warns where a GPU has NaN and infinity as results.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SPLIT, STREAMED = TritonBackend(), TritonBackend(ragged=True)

RAGGED = Case(  # shuffled pages, an absent one with a wild entry, a selection for each KV head
    kv_heads=2,
    head_dim=16,
    page_size=4,
    tokens=3,
    lengths=((4, 4, 3, 1), (0, 2, 4, 0)),
    table=((5, 2, 0, 7), (-1, 6, 1, 2**31 - 1)),
    num_pages=8,
    heads="kv",
    span=3,
    masks=(7, 13, 6),
    active=(0b110, 0b001),
    poison="nan",
    seed=3,
)
GROUPED = Case(  # a selection for each query head and two rows; more pages than one split takes
    group=4,
    head_dim=80,
    page_size=16,
    tokens=3,
    lengths=((16, 16, 16, 5, 16, 16, 0, 16, 16, 2),),
    table=((3, 1, 4, 9, 2, 6, 0, 5, 8, 7),),
    num_pages=10,
    heads="query",
    span=2,
    masks=(0b1011011101, 0b0100110111, 0),
    active=(0b101,),
    poison="nan",
    layout="token_major",
    seed=8,
)
ROWS = Case(  # rows read their own pages, of which a tile holds one and a part of the next
    group=7,
    head_dim=16,
    page_size=24,
    tokens=3,
    lengths=((24, 9, 24),),
    table=((2, 0, 1),),
    num_pages=3,
    span=1,
    masks=(5, 6, 2),
    active=(0b101,),
    poison="inf",
    regime="ties",
    layout="gapped",
    seed=5,
)
LONG = Case(  # more rows than a pass's kernels take
    head_dim=16,
    page_size=16,
    tokens=130,
    lengths=((16, 16, 7, 0),),
    table=((1, 3, 0, -5),),
    num_pages=4,
    heads="kv",
    span=64,
    masks=(7, 10, 1),
    active=((1 << 130) - 1 - 0b1010,),
    poison="nan",
    seed=2,
)
MIXED = Case(  # a long sequence between one of one page and one of none, a selection for each KV head
    kv_heads=2,
    head_dim=16,
    page_size=32,
    tokens=3,
    lengths=((7,) + (0,) * 8, (32, 32, 9, 32, 32, 0, 32, 32, 1), (0,) * 9),
    table=(tuple(range(9)), (5, 2, 0, 7, 8, -1, 3, 6, 1), (0,) * 9),
    num_pages=9,
    heads="kv",
    span=3,
    masks=(0b111111111, 0b110011111, 0b011110011),
    active=(0b111, 0b110, 0b011),
    poison="nan",
    seed=3,
)
RESTING = Case(  # a selection for each query head and two rows; tiles of several pages; a sequence at rest
    group=2,
    head_dim=24,
    page_size=12,
    tokens=3,
    lengths=((12, 12, 12, 5, 12), (12, 12, 0, 12, 2), (12, 0, 0, 0, 0)),
    table=((3, 1, 4, 9, 2), (6, 0, 5, 8, 7), (10, 0, 0, 0, 0)),
    num_pages=11,
    heads="query",
    span=2,
    masks=(0b11101, 0b10111, 0b01110),
    active=(0b101, 0, 0b111),
    poison="nan",
    layout="token_major",
    seed=8,
)
MANY = Case(  # so many rows that a program finishes several of them, the last one fewer
    group=19,
    head_dim=16,
    page_size=16,
    tokens=109,
    lengths=((16, 16, 7),),
    table=((1, 0, 2),),
    num_pages=3,
    heads="kv",
    span=109,
    masks=(0b101,),
    active=((1 << 109) - 1 - 0b1010,),
    poison="nan",
    seed=4,
)
SPLIT_CASES = {
    "ragged-float32": RAGGED,
    "grouped-float16": GROUPED,
    "rows-float32": ROWS,
    "rows-float16": ROWS,
    "long-float16": LONG,
    "many-float32": MANY,
}
STREAMED_CASES = {"mixed-float32": MIXED, "resting-float16": RESTING}
CASES = SPLIT_CASES | STREAMED_CASES
DECISIONS = (
    test_decisions.test_page_bounds_are_the_exact_minimum_and_maximum,
    test_decisions.test_bounds_after_growth_are_those_from_scratch,
    test_decisions.test_page_scores_are_exact_on_the_dyadic_grid,
    test_decisions.test_query_change_is_exact_on_the_dyadic_grid,
    test_decisions.test_scores_and_ranking_choose_the_same_pages_as_the_reference,
    test_decisions.test_pooled_scores_are_the_mean_softmax_mass_of_pages,
    test_attention.test_attend_block_equals_one_softmax,
    test_attention.test_a_block_may_have_more_or_fewer_keys_than_rows,
)
READING = (
    test_attention.test_inactive_rows_get_out_0_and_lse_minus_inf,
    test_attention.test_pages_that_nobody_selected_are_not_read,
    test_attention.test_nan_in_a_key_shows_in_every_row_that_reads_it,
    test_attention.test_a_page_changes_only_the_rows_that_selected_it,
    test_pass.test_attend_is_one_softmax_over_context_and_block,
    test_pass.test_what_is_cached_for_active_rows_is_not_read,
)
SOFTMAX = (
    test_attention.test_attend_pages_equals_one_masked_softmax,
    test_pass.test_attend_composes_its_four_operators,
)
RANKED = (
    test_ranked.test_a_rule_decides_what_the_operators_decide,
    test_ranked.test_a_rule_computes_what_the_operators_compute,
    test_ranked.test_nan_in_a_query_or_a_key_ranks_first,
    test_ranked.test_a_rule_reads_no_page_that_it_did_not_choose,
)
COUNTED = RankedRule("count", count=2, pages=2, union="kv_head", keep="active_queries")
WEIGHED = RankedRule("mass", mass=0.5, fits="one less", pages=1, union="query_head", keep="queries")
RULES = [
    ("ragged-float32", COUNTED),
    ("ragged-float32", WEIGHED),
    ("ragged-float32", RankedRule("all", fits="exactly", pages=1, union="row")),
    ("grouped-float16", COUNTED),
    ("grouped-float16", WEIGHED),
    ("rows-float32", RankedRule("mass", mass=1 / 3, pages=2, union="row", keep="active_queries")),
    ("rows-float16", RankedRule("count", count=0, fits="everything", union="row", keep="active_queries")),
    ("rows-float16", RankedRule("count", count=9, pages=9, union="query_head")),
    *((name, COUNTED) for name in STREAMED_CASES),
]


def hold(law: Any, name: str, **drawn: Any) -> None:
    """Run a law on a case, by the schedule that the case is for."""
    backend = STREAMED if name in STREAMED_CASES else SPLIT
    law.body(Subject("triton", name.rpartition("-")[2], backend), case=CASES[name], **drawn)


def called(law: Any) -> str:
    return str(law.__name__.removeprefix("test_"))


@pytest.mark.parametrize("law", DECISIONS, ids=called)
@pytest.mark.parametrize("name", ["ragged-float32", "grouped-float16", "rows-float32"])
def test_the_law_of_decisions_holds(name: str, law: Any) -> None:
    hold(law, name)


@pytest.mark.parametrize("law", READING, ids=called)
@pytest.mark.parametrize("name", ["ragged-float32", "grouped-float16", "rows-float32", "long-float16", *STREAMED_CASES])
def test_the_law_of_reading_holds(name: str, law: Any) -> None:
    hold(law, name)


@pytest.mark.parametrize("law", SOFTMAX, ids=called)
@pytest.mark.parametrize("name", [name for name in CASES if name != "many-float32"])
def test_attention_is_one_softmax(name: str, law: Any) -> None:
    hold(law, name)


def test_attention_of_many_rows_is_one_softmax() -> None:
    hold(SOFTMAX[0], "many-float32")


@pytest.mark.parametrize(("name", "rule"), RULES, ids=[f"{n}-{r.rows}-{r.union}-{r.pages}" for n, r in RULES])
def test_a_ranked_pass_is_its_operators(name: str, rule: RankedRule) -> None:
    for law in RANKED[: 4 if rule is COUNTED and name in SPLIT_CASES else 2]:
        hold(law, name, rule=rule)


def test_the_share_of_a_mass_rule_is_no_float32() -> None:
    hold(test_ranked.test_the_share_of_a_mass_rule_is_no_float32, "ragged-float32")


def test_a_ranked_pass_that_fits_no_kernel_is_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_dlm_attn_triton, "MOST_ROWS", 2)
    hold(RANKED[0], "ragged-float32", rule=COUNTED)
