"""The Triton backend under the conformance laws, on problems of one awkwardness each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs PyTorch")
pytest.importorskip("triton", reason="the Triton backend needs Triton")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from sparse_dlm_attn import (  # noqa: E402
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PageBounds,
    PassInfo,
    PrefixAttention,
    Selection,
    SparseAttentionError,
    UnavailableError,
    UnsupportedError,
)
from sparse_dlm_attn.capabilities import Problem  # noqa: E402
from sparse_dlm_attn.ranked import RankedPass  # noqa: E402
from sparse_dlm_attn_conformance import (  # noqa: E402
    test_attention,
    test_decisions,
    test_pass,
    test_ranked,
)
from sparse_dlm_attn_conformance.cases import Case  # noqa: E402
from sparse_dlm_attn_conformance.operations import OPERATORS, arrays_in, prepare  # noqa: E402
from sparse_dlm_attn_conformance.subjects import Subject  # noqa: E402
from sparse_dlm_attn_conformance.tables import RankedRule  # noqa: E402
from sparse_dlm_attn_triton import TritonBackend, common, launch, ops  # noqa: E402

# The interpreter computes with NumPy, which warns where a GPU has NaN and infinity as results.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BACKEND = TritonBackend()

RAGGED = Case(  # shuffled pages, an absent one with a wild entry, a selection for each KV head
    kv_heads=2, head_dim=16, page_size=4, tokens=3, lengths=((4, 4, 3, 1), (0, 2, 4, 0)),
    table=((5, 2, 0, 7), (-1, 6, 1, 2**31 - 1)), num_pages=8, heads="kv", span=3, masks=(7, 13, 6),
    active=(0b110, 0b001), poison="nan", seed=3,
)  # fmt: skip
GROUPED = Case(  # a selection for each query head and two rows; more pages than one split takes
    group=4, head_dim=80, page_size=16, tokens=3, lengths=((16, 16, 16, 5, 16, 16, 0, 16, 16, 2),),
    table=((3, 1, 4, 9, 2, 6, 0, 5, 8, 7),), num_pages=10, heads="query", span=2,
    masks=(0b1011011101, 0b0100110111, 0), active=(0b101,), poison="nan", layout="token_major", seed=8,
)  # fmt: skip
ROWS = Case(  # rows read their own pages, of which a tile holds one and a part of the next
    group=7, head_dim=16, page_size=24, tokens=3, lengths=((24, 9, 24),), table=((2, 0, 1),), num_pages=3,
    span=1, masks=(5, 6, 2), active=(0b101,), poison="inf", regime="ties", layout="gapped", seed=5,
)  # fmt: skip
LONG = Case(  # more rows than a pass's kernels take
    head_dim=16, page_size=16, tokens=130, lengths=((16, 16, 7, 0),), table=((1, 3, 0, -5),), num_pages=4,
    heads="kv", span=64, masks=(7, 10, 1), active=((1 << 130) - 1 - 0b1010,), poison="nan", seed=2,
)  # fmt: skip
CASES = {"ragged-float32": RAGGED, "grouped-float16": GROUPED, "rows-float32": ROWS, "rows-float16": ROWS,
         "long-float16": LONG}  # fmt: skip
WHOLE = tuple(CASES)[:3]
LAWS = (
    test_decisions.test_page_bounds_are_the_exact_minimum_and_maximum,
    test_decisions.test_bounds_after_growth_are_those_from_scratch,
    test_decisions.test_page_scores_are_exact_on_the_dyadic_grid,
    test_decisions.test_query_change_is_exact_on_the_dyadic_grid,
    test_decisions.test_scores_and_ranking_choose_the_same_pages_as_the_reference,
    test_decisions.test_pooled_scores_are_the_mean_softmax_mass_of_pages,
    test_attention.test_inactive_rows_get_out_0_and_lse_minus_inf,
    test_attention.test_pages_that_nobody_selected_are_not_read,
    test_attention.test_nan_in_a_key_shows_in_every_row_that_reads_it,
    test_attention.test_attend_block_equals_one_softmax,
    test_attention.test_a_block_may_have_more_or_fewer_keys_than_rows,
    test_pass.test_attend_is_one_softmax_over_context_and_block,
    test_pass.test_what_is_cached_for_active_rows_is_not_read,
)
OF_EACH = (
    test_attention.test_attend_pages_equals_one_masked_softmax,
    test_attention.test_a_page_changes_only_the_rows_that_selected_it,
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
]


def subject(dtype: str) -> Subject:
    return Subject("triton", dtype, BACKEND)


def named(law: Any) -> str:
    return str(law.__name__.removeprefix("test_"))


@pytest.mark.parametrize("law", LAWS, ids=named)
@pytest.mark.parametrize("name", WHOLE)
def test_the_law_holds(name: str, law: Any) -> None:
    law.body(subject(name.rpartition("-")[2]), case=CASES[name])


@pytest.mark.parametrize("law", OF_EACH, ids=named)
@pytest.mark.parametrize("name", CASES)
def test_the_law_of_selections_holds(name: str, law: Any) -> None:
    law.body(subject(name.rpartition("-")[2]), case=CASES[name])


@pytest.mark.parametrize(("name", "rule"), RULES, ids=[f"{n}-{r.rows}-{r.union}-{r.pages}" for n, r in RULES])
def test_a_ranked_pass_is_its_operators(name: str, rule: RankedRule) -> None:
    for law in RANKED[: 4 if rule is COUNTED else 2]:
        law.body(subject(name.rpartition("-")[2]), case=CASES[name], rule=rule)


@pytest.mark.parametrize(("name", "rule"), RULES, ids=[f"{n}-{r.rows}-{r.union}-{r.pages}" for n, r in RULES])
@pytest.mark.usefixtures("fresh_plans")
def test_a_program_may_finish_several_rows(
    name: str, rule: RankedRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large batches do: programs of `finish_kernel` take some rows each, the last of them fewer."""
    monkeypatch.setattr(launch, "MANY_ROWS", 1)
    for law in RANKED[: 4 if rule is COUNTED else 2]:
        law.body(subject(name.rpartition("-")[2]), case=CASES[name], rule=rule)


def test_the_share_of_a_mass_rule_is_no_float32() -> None:
    test_ranked.test_the_share_of_a_mass_rule_is_no_float32.body(subject("float32"), case=RAGGED)


def test_a_ranked_pass_that_fits_no_kernel_is_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_ROWS", 2)
    monkeypatch.setattr(ops, "ranked_plan", None)
    RANKED[0].body(subject("float32"), case=RAGGED, rule=COUNTED)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_writes_into_no_argument_and_returns_none(operator: str) -> None:
    call = prepare(subject("float32"), replace(RAGGED, poison="zero").arrays("float32"), operator)
    before = {name: array.clone() for name, array in call.arguments.items()}
    results = arrays_in(call.run())
    for name, array in call.arguments.items():
        assert torch.equal(array, before[name]), name
        owner = array.untyped_storage().data_ptr()
        shared = [key for key, result in results.items() if result.untyped_storage().data_ptr() == owner]
        assert not shared


def problem(tokens: int = 4, head_dim: int = 16, dtype: Any = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    pages = torch.randn(3, 1, 8, head_dim, device=DEVICE).to(dtype)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([[8, 8, 5]], dtype=torch.int32, device=DEVICE)
    block = [torch.randn(1, heads, tokens, head_dim, device=DEVICE).to(dtype) for heads in (2, 1, 1)]
    context = Context(pages, pages.clone(), table, lengths)
    return {"q": block[0], "k": block[1], "v": block[2], "context": context,
            "selection": Selection.all_pages(context, tokens),
            "active": torch.ones(1, tokens, dtype=torch.bool, device=DEVICE)}  # fmt: skip


def attend(backend: TritonBackend = BACKEND, **changed: Any) -> Any:
    values = {**problem(), **changed}
    names = ("q", "k", "v", "context", "selection", "active")
    return backend.attend(*(values[name] for name in names), None)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        (lambda: {"q": problem()["q"].cpu().numpy()}, SparseAttentionError, "as q is"),
        (lambda: problem(dtype=torch.float64), UnsupportedError, "float64"),
        (lambda: problem(head_dim=257), UnsupportedError, "head_dim 257 exceeds 256"),
        (lambda: {"k": problem()["k"].to("meta")}, SparseAttentionError, "device"),
        (lambda: {"q": problem()["q"].to("meta")}, SparseAttentionError, "device"),
        (lambda: {"active": torch.ones(1, 5, dtype=torch.bool, device=DEVICE)}, SparseAttentionError,
         "active"),
    ],
    ids=["library", "float64", "head-dim", "device-of-k", "device-of-q", "rows"],
)  # fmt: skip
def test_what_it_cannot_compute_is_refused(
    changed: Callable[[], dict[str, Any]], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        attend(**changed())


@pytest.mark.clause("ERROR-1")
def test_arrays_of_numpy_are_refused_as_a_whole() -> None:
    array = RAGGED.arrays("float32")
    with pytest.raises(InvalidTypeError, match=r"must be a torch\.Tensor"):
        BACKEND.page_bounds(array.context())


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("device", ["tpu", "mps", 3.5])
def test_a_device_that_it_cannot_use_is_refused(device: object) -> None:
    with pytest.raises(InvalidArgumentError, match="device"):
        TritonBackend(device=device)  # type: ignore[arg-type]


def test_the_interpreter_computes_on_the_cpu_alone() -> None:
    if DEVICE != "cpu":
        pytest.skip("a GPU is there: kernels are compiled")
    assert TritonBackend("cpu").device == "cpu"
    with pytest.raises(InvalidArgumentError, match="must be 'cpu' while TRITON_INTERPRET=1"):
        TritonBackend("cuda")


@pytest.mark.clause("ERROR-2")
def test_without_the_interpreter_a_cpu_is_refused() -> None:
    code = "from sparse_dlm_attn_triton import TritonBackend; TritonBackend('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert UnavailableError.__name__ in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


@pytest.mark.clause("ERROR-2")
def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "INTERPRETED", False)
    for number, have in enumerate([(7, 5), (8, 0), (9, 0)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, have=have: have)
        device = torch.device("cuda", 90 + number)  # answers are kept for each
        if have < (8, 0):
            with pytest.raises(UnavailableError, match=r"capability is 7\.5, and kernels need 8\.0.*torch"):
                common.chained(device)
        else:
            assert common.chained(device) == (have >= (9, 0))


@pytest.mark.clause("CAPS-1")
def test_capabilities_name_every_reason() -> None:
    declared = BACKEND.capabilities
    assert declared.devices == (DEVICE,)
    assert ("bfloat16" in declared.dtypes) == (DEVICE == "cuda")
    assert declared.deterministic
    assert BACKEND.why_not(Problem("float16", 80, 24, 7, 1, 200, DEVICE)) == []
    reasons = BACKEND.why_not(Problem("float64", 257, 300, 2, 1, 4, "tpu"))
    for part in ("dtype float64", "device tpu", "head_dim 257", "page_size 300"):
        assert any(part in reason for reason in reasons), reasons
    assert len(reasons) == 4


@pytest.mark.clause("CAPS-1")
def test_the_driver_refuses_what_is_not_declared() -> None:
    values = problem(dtype=torch.float64)
    attention = PrefixAttention("dense", BACKEND)
    with pytest.raises(UnsupportedError, match="dtype float64"):
        attention(values["q"], values["k"], values["v"], values["context"])


def operator_arguments() -> dict[str, tuple[Any, ...]]:
    """Return positional arguments of every custom operator."""
    given = problem()
    q, k, v, context = (given[name] for name in ("q", "k", "v", "context"))
    pages = (context.k_pages, context.v_pages, context.page_table, context.page_lengths)
    bounds: PageBounds = BACKEND.page_bounds(context)
    chosen = (given["selection"].mask, 4, given["active"])
    scores = BACKEND.page_scores(q, bounds)
    count = torch.full((1, 1, 1), 2, dtype=torch.int32, device=DEVICE)
    rule = (q + 1, 2, None, 8, 1)
    return {
        "page_bounds": (context.k_pages, *pages[2:]),
        "page_scores": (q, bounds.lower, bounds.upper),
        "top_pages": (scores, count, context.exists[:, None, None]),
        "attend_pages": (q, *pages, *chosen, 0.25),
        "attend_block": (q, k, v, 0.25),
        "attend": (q, k, v, *pages, *chosen, 0.25, q + 1, scores[..., 0].clone()),
        "attend_ranked": (q, k, v, *pages, bounds.lower, bounds.upper, *rule, "row", "queries", 0.25, None,
                          None),
        "pooled_scores": (q, context.k_pages, *pages[2:], 3, 0.25, None),
    }  # fmt: skip


@pytest.mark.parametrize("name", ops.__all__)
def test_fakes_tell_the_real_shapes(name: str) -> None:
    arguments = operator_arguments()[name]
    real = getattr(ops, name)(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for part in arguments]
        told = getattr(ops, name)(*fakes)
    for got, want in zip(*((part,) if isinstance(part, torch.Tensor) else part for part in (told, real)),
                         strict=True):  # fmt: skip
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize(("union", "keep"), [("kv_head", "nothing"), ("query_head", "active_queries")])
def test_fakes_of_ranked_passes_follow_the_rule(union: str, keep: str) -> None:
    arguments = list(operator_arguments()["attend_ranked"])
    arguments[14:16] = union, keep
    real = ops.attend_ranked(*arguments)
    with FakeTensorMode() as mode:
        told = ops.attend_ranked(
            *(mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for part in arguments)
        )
    assert [part.shape for part in told] == [part.shape for part in real]


@pytest.mark.parametrize("name", ["page_scores", "attend_ranked"])
def test_the_operator_is_registered_as_pytorch_asks(name: str) -> None:
    operator = getattr(torch.ops.sparse_dlm_attn_triton, name).default
    torch.library.opcheck(operator, operator_arguments()[name])


@pytest.mark.clause("RANKED-1")
@pytest.mark.parametrize("policy", ["losa:budget=8,active=2", "quest:budget=8"])
def test_the_driver_takes_the_ranked_path(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RankedPass] = []

    class Watching(TritonBackend):
        def attend_ranked(self, *arguments: Any, **options: Any) -> Any:
            asked.append(arguments[5])
            return super().attend_ranked(*arguments, **options)

        def top_pages(self, *arguments: Any, **options: Any) -> Any:
            raise AssertionError("a pass that is ranked asks for no operator of its own")

    attention, memory, values = PrefixAttention(policy, Watching()), None, problem()
    if policy.startswith("losa"):  # whose pass 0 has nothing to measure change against
        _, memory = PrefixAttention(policy, BACKEND)(
            values["q"], values["k"], values["v"], values["context"], None, PassInfo(0)
        )
    monkeypatch.setattr(launch, "top_pages", None)
    out, memory = attention(
        values["q"] + 1, values["k"], values["v"], values["context"], memory, PassInfo(1)
    )
    assert len(asked) == 1
    assert asked[0].pages == 1
    assert memory.traffic.metadata_reads == 1
    assert out.shape == values["q"].shape
    assert np.isfinite(out.cpu().numpy()).all()
