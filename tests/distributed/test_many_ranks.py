"""Pages over two and four ranks, and over ranks and heads: what one device gives, decisions bit for bit.

Each rank is a process. On GPUs the same scenarios run over NCCL where there are two of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from shards import BLOCKS, block_of, infos, policies, policy_of

from sparse_dlm_attn import PrefixAttention
from sparse_dlm_attn import policies as registered
from sparse_dlm_attn.operators import gather_pages
from sparse_dlm_attn_conformance.accuracy import CEILING
from sparse_dlm_attn_distributed.packing import packed_bytes
from sparse_dlm_attn_torch import TorchBackend

PLACES = [
    ("cpu", "gloo", 2), ("cpu", "gloo", 4), ("cuda/collective", "nccl", 2), ("cuda/symmetric", "symmetric", 2)
]
PAGES = pytest.mark.parametrize(
    ("device", "world"), [(device, world) for device, _, world in PLACES],
    ids=[f"{name}-{world}" for _, name, world in PLACES],
)
TWO = pytest.mark.parametrize(
    ("device", "world"), [(device, world) for device, _, world in PLACES if world == 2],
    ids=[f"{name}-{world}" for _, name, world in PLACES if world == 2],
)
GPUS = pytest.mark.parametrize("device", ["cuda/collective", "cuda/symmetric"], ids=["nccl", "symmetric"])
FAILURES = "failures,death"
SCENARIOS = "every_policy,every_ownership,ranking,bytes_sent,heads_too"


@cache
def on_one_device(policy: str, name: str) -> list[dict[str, Any]]:
    """Run a block with all pages in one place."""
    block = block_of(name).converted(lambda array: torch.from_numpy(array.copy()))
    attention, memory, seen = PrefixAttention(policy_of(policy), TorchBackend()), None, []
    for index, info in enumerate(infos(block)):
        out, memory = attention(block.q[index], block.k, block.v, block.context, memory, info)
        seen.append({
            "out": out, "lse": memory.state.lse, "active": memory.active,
            "mask": memory.selection.for_rows(out.shape[1], out.shape[2]),
        })
    return seen


@cache
def budget(name: str, index: int) -> Any:
    """Twice the suite's ceiling: either side may lie that far from the truth. ``(batch, q_heads, rows)``."""
    block = block_of(name)
    keys = gather_pages(block.context.k_pages, block.context)
    keys = keys.reshape(*keys.shape[:2], -1, keys.shape[-1])
    values = max(np.abs(block.v).max(), np.abs(block.context.v_pages).max())
    queries = np.abs(np.stack(block.q[: index + 1])).max(axis=0)  # states of earlier passes are reused
    group = queries.shape[1] // keys.shape[1]
    keys = np.repeat(np.concatenate([keys, block.k], axis=2), group, axis=1)
    condition = np.einsum("bhtd,bhnd->bhtn", queries, np.abs(keys)).max(axis=3) / np.sqrt(keys.shape[3])
    return torch.from_numpy(2 * CEILING["float32"] * (1 + condition) * max(values, 1.0))


def expect_same(got: list[dict[str, Any]], want: list[dict[str, Any]], name: str, heads: slice) -> None:
    for index, (here, there) in enumerate(zip(got, want, strict=True)):
        where, room = f"pass {index}", budget(name, index)[:, heads]
        assert torch.equal(here["active"], there["active"]), where
        assert torch.equal(here["mask"], there["mask"][:, heads]), where
        error = (here["out"] - there["out"][:, heads]).abs().amax(3)
        assert bool((error <= room).all()), f"{where}: {float(error.max())}"
        mine, theirs = here["lse"], there["lse"][:, heads]
        assert torch.equal(mine.isneginf(), theirs.isneginf()), where
        error = torch.where(mine.isneginf(), 0.0, mine - theirs).abs()
        assert bool((error <= room).all()), f"{where}: {float(error.max())}"


def test_every_registered_policy_is_among_the_cases() -> None:
    assert set(registered()) <= {policy.partition(":")[0] for policy in policies()}


CASES = [
    pytest.param(device, world, policy, id=f"{backend}-{world}-{policy}")
    for device, backend, world in PLACES
    for policy in policies(world)
]


@pytest.mark.parametrize(("device", "world", "policy"), CASES)
def test_ranks_decide_and_compute_as_one_device(ranks: Any, device: str, world: int, policy: str) -> None:
    for rank in ranks.run(SCENARIOS, device, world):
        for name in BLOCKS:
            want = on_one_device(policy, name)
            expect_same(rank["every_policy"][policy, name], want, name, slice(None))


@PAGES
@pytest.mark.parametrize("rule", ["random", "uneven", "empty", "one rank", "round robin"])
def test_it_does_not_matter_who_holds_a_page(ranks: Any, device: str, world: int, rule: str) -> None:
    for rank in ranks.run(SCENARIOS, device, world):
        for (policy, whose), got in rank["every_ownership"].items():
            if whose == rule:
                expect_same(got, on_one_device(policy, "pages of 4"), "pages of 4", slice(None))


@PAGES
def test_all_ranks_come_to_the_same_bits(ranks: Any, device: str, world: int) -> None:
    first, *others = ranks.run(SCENARIOS, device, world)
    for other in others:
        for key, passes in first["every_policy"].items():
            for here, there in zip(passes, other["every_policy"][key], strict=True):
                assert all(torch.equal(here[part], there[part]) for part in here), key


@PAGES
def test_top_pages_of_ties_infinities_and_nan_are_those_of_one_device(
    ranks: Any, device: str, world: int
) -> None:
    for rank in ranks.run(SCENARIOS, device, world):
        assert all(rank["ranking"]), [seed for seed, same in enumerate(rank["ranking"]) if not same]


@PAGES
def test_bytes_do_not_grow_with_the_context(ranks: Any, device: str, world: int) -> None:
    block = block_of("64 pages")
    q = block.q[0]
    state = block.passes * packed_bytes(q.shape[0] * q.shape[1] * q.shape[2], q.shape[3], 4)
    for rank in ranks.run(SCENARIOS, device, world):
        sent = rank["bytes_sent"]
        for policy in {policy for policy, _ in sent}:
            short, long = (dict(sent[policy, name]) for name in ("64 pages", "256 pages"))
            for of in (short, long):
                of.pop("the check of ownership")  # once a block, and only where contents are checked
            assert short == long
            assert short.pop("attend") == state
            assert set(short) <= {"top_pages"}
        candidates = 8 // 4  # of budget=8, in pages
        rows = q.shape[0] * q.shape[1] * q.shape[2]
        assert sent["quest:budget=8", "256 pages"]["top_pages"] == block.passes * rows * candidates * 8


def test_kv_heads_can_lie_on_other_ranks_too(ranks: Any) -> None:
    results = ranks.run(SCENARIOS, "cpu", 4)
    refused = set()
    for rank in results:
        for policy, got in rank["heads_too"].items():
            if isinstance(got, str):
                assert "must not choose pages by several KV heads" in got
                refused.add(policy)
                continue
            column, passes = got
            heads = slice(2 * column, 2 * column + 2)
            want = on_one_device(policy, "pages of 4")
            expect_same(passes, want, "pages of 4", heads)
    assert refused == {
        policy for policy in policies()
        if policy.startswith("sparse-dllm") or "union_over=layer" in policy or "score_scale=heads" in policy
    }


@GPUS
def test_passes_in_a_cuda_graph_can_be_replayed(ranks: Any, device: str) -> None:
    for rank in ranks.run("graphs", device, 2, 90):
        for policy, (same, exchange) in rank["graphs"].items():
            assert all(same), (policy, same)
            assert exchange == device.partition("/")[2]


@TWO
def test_a_failure_of_one_rank_is_a_typed_error_on_all_in_time(ranks: Any, device: str, world: int) -> None:
    failures = FAILURES if device == "cpu" else "failures"
    one, other = (rank["failures"] for rank in ranks.run(failures, device, world, 100))
    seconds = 2 if device == "cpu" else 4
    expected = {  # what rank 0 and rank 1 raise, and what both must be told
        "one_raises": ("RankError", "InvalidArgumentError", "k must have shape"),
        "one_raises_outside": ("RankError", "MemoryError", "no room"),
        "one_sleeps": ("RankError", "RankError", f"ranks 1 did not come within {seconds} s"),
        "one_sleeps_unchecked": ("RankError", "RankError", f"ranks 1 did not come within {seconds} s"),
        "one_has_more_rows": ("RankError", "RankError", "same policy, block, passes and shapes"),
        "lengths_differ": ("InvalidArgumentError",) * 2 + ("tell every rank of pages that grow",),
        "one_saves": ("RankError", "RankError", "is_save False, layer 0"),
        "page_sizes_differ": ("InvalidArgumentError",) * 2 + ("must have the same page size",),
        "arrays of another library": ("InvalidTypeError",) * 2 + ("compute on tensors of PyTorch",),
        "a_page_twice": ("InvalidArgumentError",) * 2 + ("exactly one rank; got 2 ranks",),
        "policies differ": ("InvalidArgumentError",) * 2 + ("policy must be the same on every rank",),
        "candidates differ": ("InvalidArgumentError",) * 2 + ("Give every rank the same backend",),
        "ways differ": ("InvalidArgumentError",) * 2 + ("Give every rank the same backend",),
        "no such way": ("InvalidArgumentError",) * 2 + ("one of auto, collective, symmetric",),
        "meshes differ": ("InvalidArgumentError",) * 2 + ("init_device_mesh",),
        "one rank alone": ("RankError", "no error", f"ranks 1 did not come within {seconds} s before mesh"),
        "together again": ("no error", "no error", ""),
    }
    if device == "cpu":
        expected["not on this device"] = ("UnavailableError",) * 2 + ("tensors lie in host memory",)
        assert one["taken"][:2] == ("collective", []) and "exchange='collective'" in one["taken"][2]
    for name, (here, there, text) in expected.items():
        assert (one[name][0], other[name][0]) == (here, there), (name, one[name], other[name])
        assert text in one[name][1], one[name]
        assert max(one[name][2], other[name][2]) < seconds + 1.0 + 5.0, name
    failed = ("one_raises", "one_raises_outside", "one_sleeps", "one_sleeps_unchecked", "one_has_more_rows",
              "one_saves")
    for name in failed:
        for seen in (one, other):  # and nothing hangs afterwards
            kind, _, seconds = seen[f"{name}, then a pass"]
            assert kind == "RankError"
            assert seconds < 1.0
    # All refused it alike, so nobody is out of step.
    for name in ("lengths_differ", "page_sizes_differ", "a_page_twice"):
        assert one[f"{name}, then a pass"][0] == other[f"{name}, then a pass"][0] == "no error"


def test_the_death_of_a_process_is_a_typed_error_on_the_others(ranks: Any) -> None:
    survivor, dead = ranks.run(FAILURES, "cpu", 2, 100)
    assert "death" not in dead
    kind, text = survivor["death"]
    assert kind == "RankError"
    assert "broke" in text or "did not come" in text
