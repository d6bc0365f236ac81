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
from shards import BLOCKS, RULES, block_of, infos, policies, policy_of

from sparse_dlm_attn import PrefixAttention
from sparse_dlm_attn.operators import gather_pages
from sparse_dlm_attn_conformance.accuracy import CEILING
from sparse_dlm_attn_torch import TorchBackend

PLACES = [("cpu", 2), ("cpu", 4), ("cuda", 2)]
PAGES = pytest.mark.parametrize(("device", "world"), PLACES)
TWO = pytest.mark.parametrize("device", ["cpu", "cuda"])
SCENARIOS = "every_policy,every_ownership,bounds,bytes_sent,heads_too"


@cache
def on_one_device(policy: str, name: str) -> list[dict[str, Any]]:
    """Run a block with all pages in one place."""
    block = block_of(name).converted(lambda array: torch.from_numpy(array.copy()))
    attention, memory, seen = PrefixAttention(policy_of(policy), TorchBackend()), None, []
    for index, info in enumerate(infos(block)):
        out, memory = attention(block.q[index], block.k, block.v, block.context, memory, info)
        seen.append(
            {
                "out": out,
                "lse": memory.state.lse,
                "active": memory.active,
                "mask": memory.selection.for_rows(out.shape[1], out.shape[2]),
            }
        )
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


CASES = [(device, world, policy) for device, world in PLACES for policy in policies(world)]


@pytest.mark.parametrize(("device", "world", "policy"), CASES)
def test_ranks_decide_and_compute_as_one_device(ranks: Any, device: str, world: int, policy: str) -> None:
    for rank in ranks.run(SCENARIOS, device, world):
        for name in BLOCKS:
            want = on_one_device(policy, name)
            expect_same(rank["every_policy"][policy, name], want, name, slice(None))


@PAGES
@pytest.mark.parametrize("rule", RULES)
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
def test_every_rank_gets_the_bounds_of_all_pages_bit_for_bit(ranks: Any, device: str, world: int) -> None:
    for rank in ranks.run(SCENARIOS, device, world):
        assert all(rank["bounds"]), rank["bounds"]


@PAGES
def test_a_pass_sends_one_state_and_a_block_bounds_or_masses(ranks: Any, device: str, world: int) -> None:
    block = block_of("64 pages")
    batch, q_heads, rows, head_dim = block.q[0].shape
    states = block.passes * 4 * batch * q_heads * rows * (head_dim + 1)
    for rank in ranks.run(SCENARIOS, device, world):
        sent = rank["bytes_sent"]
        for name, pages in (("64 pages", 64), ("256 pages", 256)):
            bounds = 2 * 4 * batch * block.k.shape[1] * pages * head_dim
            masses = {"pooled_scores": 4 * batch * q_heads * pages}
            for policy in ("dense", "losa:active=2,budget=8", "quest:budget=8"):
                ranked = {} if policy == "dense" else {"page_bounds": bounds}
                assert sent[policy, name] == {"attend": states}
                assert sent[policy, name, "without bounds"] == {"attend": states, **ranked}
            assert sent["mage:budget=8,dense_layers=0", name] == {"attend": states, **masses}


def test_kv_heads_can_lie_on_other_ranks_too(ranks: Any) -> None:
    refused = set()
    for rank in ranks.run(SCENARIOS, "cpu", 4):
        for policy, got in rank["heads_too"].items():
            if isinstance(got, str):
                assert "must not choose pages by several KV heads" in got
                refused.add(policy)
                continue
            column, passes = got
            heads = slice(2 * column, 2 * column + 2)
            expect_same(passes, on_one_device(policy, "pages of 4"), "pages of 4", heads)
    assert refused == {
        policy
        for policy in policies()
        if policy.startswith("sparse-dllm") or "union_over=layer" in policy or "score_scale=heads" in policy
    }


def test_passes_in_a_cuda_graph_can_be_replayed(ranks: Any) -> None:
    for rank in ranks.run("graphs", "cuda", 2, 90):
        for policy, same in rank["graphs"].items():
            assert all(same), (policy, same)


@TWO
def test_what_ranks_were_given_differently_is_an_error_on_all_of_them(ranks: Any, device: str) -> None:
    for rank in ranks.run("mistakes,late" if device == "cpu" else "mistakes", device, 2, 100):
        assert rank["mistakes"] == []


def test_a_rank_that_does_not_come_ends_the_wait_at_the_time_limit_of_the_group(ranks: Any) -> None:
    waiting, _ = ranks.run("mistakes,late", "cpu", 2, 100)
    text, seconds = waiting["late"]
    assert "time" in text.lower()
    assert 1.5 < seconds < 5.5
