"""What break-even asks, measures and answers; on a CPU, where only the clock is made up."""

from __future__ import annotations

import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bench needs PyTorch")

from sparse_dlm_attn import InvalidArgumentError, UnknownNameError, get_policy  # noqa: E402
from sparse_dlm_attn_benchmarks import layer, timing  # noqa: E402
from sparse_dlm_attn_benchmarks.break_even import Point, answer  # noqa: E402
from sparse_dlm_attn_benchmarks.gate import WrongResultError, check_passes  # noqa: E402
from sparse_dlm_attn_benchmarks.layer import budget_for, layers, relative_density  # noqa: E402
from sparse_dlm_attn_benchmarks.peers import DENSE, dense_peers, expected_dense  # noqa: E402
from sparse_dlm_attn_benchmarks.shape import Shape, with_budget  # noqa: E402
from sparse_dlm_attn_benchmarks.sparse_peers import Chosen, sparse_peers  # noqa: E402
from sparse_dlm_attn_torch import TorchBackend  # noqa: E402

SMALL = Shape(batch=2, context=512, tokens=4, q_heads=4, kv_heads=2, head_dim=16, page_size=16, dtype="float32")


@pytest.fixture(autouse=True)
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "COLD_BYTES", 1)
    monkeypatch.setattr(timing, "COLD_BYTES", 1)


def point(context: int, asked: float, speedup: float) -> Point:
    return Point(context, asked, asked, "losa", 10.0, 10.0 * speedup, "any", 0.0)


def test_the_answer_names_the_shortest_context_from_which_on_sparse_always_wins() -> None:
    points = [
        point(1024, 0.1, 1.2),
        point(2048, 0.1, 0.9),
        point(4096, 0.1, 1.5),
        point(8192, 0.1, 3.25),
        point(1024, 0.5, 0.5),
        point(2048, 0.5, 0.6),
        point(4096, 0.5, 0.9),
        point(8192, 0.5, 1.1),
    ]
    assert answer(points, "losa") == (
        "losa beats the fastest dense kernel from 4K tokens on at 10% (1.50x to 3.25x), from 8K tokens on at "
        "50% (1.10x) of the context read."
    )


def test_the_answer_says_where_sparse_comes_closest_if_it_never_wins() -> None:
    said = answer([point(1000, 0.1, 0.5), point(2048, 0.1, 0.7), point(2048, 0.3, 0.6)], "losa")
    assert said.startswith("losa beats dense attention nowhere up to 2K tokens")
    assert "at 2K tokens and 10% of them read, with 0.70x" in said


def test_a_policy_gets_its_budget() -> None:
    assert with_budget("losa", 64) == "losa:budget=64"
    assert get_policy(with_budget("losa:active=3", 64)) == get_policy("losa", active=3, budget=64)
    with pytest.raises(InvalidArgumentError, match="leave its budget out"):
        with_budget("losa:budget=4", 64)
    with pytest.raises(UnknownNameError, match="budget"):
        with_budget("dense", 64)


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_the_budget_is_the_smallest_that_reads_so_much(density: float) -> None:
    backend = TorchBackend()
    one = layers(SMALL, backend, device="cpu")[0]
    policy, read = budget_for(density, "losa", SMALL, backend, one)
    budget = get_policy(policy).budget  # type: ignore[attr-defined]
    assert read >= density
    assert budget == SMALL.page_size or (
        relative_density(with_budget("losa", budget - SMALL.page_size), backend, one) < density
    )


def test_a_wrong_backend_is_not_timed() -> None:
    class Late(TorchBackend):
        def attend(self, *arguments: Any, **options: Any) -> Any:
            out, state = super().attend(*arguments, **options)
            return out * 1.01, state

        def attend_ranked(self, *arguments: Any, **options: Any) -> Any:
            result = super().attend_ranked(*arguments, **options)
            object.__setattr__(result, "out", result.out * 1.01)
            return result

    one = layers(SMALL, TorchBackend(), device="cpu")[0]
    assert check_passes(SMALL, "losa:budget=64", TorchBackend(), one) < 1e-4
    with pytest.raises(WrongResultError, match="relative error"):
        check_passes(SMALL, "losa:budget=64", Late(), one)


def test_expected_dense_attention_is_that_of_pytorch() -> None:
    one = layers(SMALL, TorchBackend(), device="cpu")[0]
    out, lse = expected_dense(one)
    wanted = torch.nn.functional.scaled_dot_product_attention(one.q_next, *one.cache, enable_gqa=True)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
    keys = one.cache[0].repeat_interleave(2, 1)
    torch.testing.assert_close(lse, (one.q_next @ keys.mT / 4).logsumexp(-1), atol=1e-5, rtol=0)


def test_a_peer_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn", "flash_attn_interface", "fa3_fwd_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)
    made = layers(SMALL, TorchBackend(), device="cpu")
    names = tuple(name for name in DENSE if "flash-attn" in name or "FlashInfer paged" in name)
    pages, rows = torch.ones(2, 2, 1, 32, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    sparse = ("FlashInfer paged, heads folded", "flash-attn 3 paged, heads folded")
    found = dense_peers(made, SMALL, names) | sparse_peers([Chosen(one, pages, rows) for one in made], SMALL, sparse)
    assert len(found) == len(names) + 2
    for said in found.values():
        assert isinstance(said, str) and said.startswith("ModuleNotFoundError")
