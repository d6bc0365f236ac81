"""Kernels of the exchange, interpreted on the CPU: all ranks send, one after the other, then all receive."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles for the GPU here; test_many_ranks runs the kernels", allow_module_level=True)

from sparse_dlm_attn import AttentionState, Context, RankedPass  # noqa: E402
from sparse_dlm_attn.operators import merge, reuse  # noqa: E402
from sparse_dlm_attn_distributed import ShardedContext, launches, ranked  # noqa: E402
from sparse_dlm_attn_distributed.mailbox import Mailbox  # noqa: E402
from sparse_dlm_attn_distributed.packing import packed, packed_bytes  # noqa: E402
from sparse_dlm_attn_torch import TorchBackend  # noqa: E402


@dataclass
class Rank:
    """What a launch asks of `Mailboxes`, without symmetric memory."""

    rank: int
    ranks: int

    words = (torch.zeros(1, dtype=torch.int32), 10**9)

class Ranks:
    """Mailboxes of all ranks in one process."""

    def __init__(self, ranks: int, size: int, programs: int) -> None:
        space = -(-size // 256) * 256
        total = 2 * ranks * space + 4 * ranks * programs
        self.memory = [torch.full((total // 8 + 33,), -1, dtype=torch.int64) for _ in range(ranks)]
        for memory in self.memory:
            memory.view(torch.int8)[2 * ranks * space :] = 0  # flags
        addresses = [-(-memory.data_ptr() // 16) * 16 for memory in self.memory]
        self.boxes = [
            Mailbox(torch.tensor([*addresses, 0]), torch.zeros(programs, dtype=torch.int32), space,
                    programs, None)
            for _ in range(ranks)
        ]
        self.ranks = [Rank(rank, ranks) for rank in range(ranks)]

    def exchange(self, launch: Any) -> list[Any]:
        """Run the sending half on all ranks, then the receiving one."""
        for number in range(len(self.ranks)):
            launch(self.ranks[number], self.boxes[number], number, 1)
        return [launch(self.ranks[n], self.boxes[n], n, 2) for n in range(len(self.ranks))]

def states(ranks: int, shape: tuple[int, ...], dtype: Any, seed: int) -> list[AttentionState]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(ranks):
        out = torch.randn(shape, generator=draw).to(dtype)
        lse = 3 * torch.randn(shape[:3], generator=draw)
        empty = torch.rand(shape[:3], generator=draw) < 0.3
        # What a state of weight 0 holds does not matter: NaN here.
        out = torch.where(empty[..., None], torch.nan, out.float()).to(dtype)
        made.append(AttentionState(out, torch.where(empty, -torch.inf, lse)))
    return made

@pytest.mark.parametrize("words", [1, 1500])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gets_every_message_again_and_again(ranks: int, words: int) -> None:
    programs = launches.programs_of_gather(words, torch.device("cpu"))
    group = Ranks(ranks, words * 4, programs)
    for turn in range(3):
        sent = torch.arange(ranks * words, dtype=torch.int32).view(ranks, words) + 7 * turn
        results = [torch.zeros((ranks, words), dtype=torch.int32) for _ in range(ranks)]
        group.exchange(
            lambda rank, box, number, phase, sent=sent, results=results:
            launches.gather(rank, box, sent[number], results[number], phase)
        )
        assert all(torch.equal(result, sent) for result in results)
        assert all(bool((box.epochs == turn + 1).all()) for box in group.boxes)

@pytest.mark.parametrize(
    ("ranks", "case", "dtype"),
    [
        (2, "pass", torch.float32), (3, "pass", torch.float16), (2, "pass with reuse", torch.float32),
        (2, "context alone", torch.float32), (2, "another shape", torch.float16),
    ],
)
def test_merging_on_arrival_is_the_composed_merge(ranks: int, case: str, dtype: Any) -> None:
    shape = (1, 2, 3, 24) if case == "another shape" else (2, 4, 1, 16)
    keys, kv_heads = (19 if case == "another shape" else shape[2]), 2
    draw, ops = torch.Generator().manual_seed(5), TorchBackend()
    q = torch.randn(shape, generator=draw).to(dtype)
    k, v = (torch.randn((shape[0], kv_heads, keys, shape[3]), generator=draw).to(dtype) for _ in range(2))
    scale = 0.3
    block = None if case == "context alone" else launches.Block(q, k, v, scale)
    size = packed_bytes(q.shape[0] * q.shape[1] * q.shape[2], q.shape[3], q.element_size())
    group = Ranks(ranks, size, launches.programs_of_merge(q[..., 0].numel(), q.device))
    for turn in range(2):
        parts = states(ranks, shape, dtype, turn)
        active = cached = None
        want = merge(*parts)
        if case == "pass with reuse":
            active = torch.rand((shape[0], shape[2]), generator=draw) < 0.5
            cached = AttentionState(
                torch.randn(shape, generator=draw).to(dtype), torch.randn(shape[:3], generator=draw)
            )
            want = reuse(active, want, cached)
        results = group.exchange(
            lambda rank, box, number, phase, of=(parts, active, cached):
            launches.merge_sent(rank, box, of[0][number], of[1], of[2], block, phase)
        )
        results.append(
            launches.merge_gathered(
                torch.stack([packed(part) for part in parts]), parts[0], active, cached, block
            )
        )
        room = 1e-5 if dtype == torch.float32 else 4e-3
        for out, state in results:
            torch.testing.assert_close(state.out, want.out, atol=room, rtol=room)
            torch.testing.assert_close(state.lse, want.lse, atol=1e-5, rtol=1e-5)
            if block is not None:
                expected = merge(want, ops.attend_block(q, k, v, scale=scale)).out
                torch.testing.assert_close(out, expected, atol=room, rtol=room)
            first_out, first = results[0]
            assert torch.equal(state.out, first.out) and torch.equal(state.lse, first.lse)
            assert block is None or torch.equal(out, first_out)

def test_nan_of_a_rank_with_weight_shows() -> None:
    parts = states(2, (1, 1, 2, 16), torch.float32, 3)
    parts[1].out[0, 0, 0, 3] = torch.nan
    parts[1].lse[0, 0, 0] = 0.0
    gathered = torch.stack([packed(part) for part in parts])
    _, state = launches.merge_gathered(gathered, parts[0], None, None, None)
    assert bool(state.out[0, 0, 0, 3].isnan())
    assert not bool(state.out[0, 0, 0, 4].isnan())


RULES = {
    "every row": {"pages": 2},
    "count": {"pages": 3, "count": 2, "keep": "queries"},
    "mass": {"pages": 2, "mass": 0.5},
    "no row": {"pages": 2, "count": 0},
    "more than there are": {"pages": 7, "count": 1},
    "whole": {"pages": 1, "count": 2, "budget": 1000},
    "own pages": {"pages": 2, "count": 2, "union": "row"},
    "query heads": {"pages": 1, "count": 3, "union": "query_head"},
}


@pytest.mark.parametrize("name", RULES)
def test_ranks_choose_rows_and_pages_as_one_device(name: str) -> None:
    given, ranks, ops = RULES[name], 2 if name != "mass" else 3, TorchBackend()
    draw = torch.Generator().manual_seed(len(name))

    def grid(*shape: int) -> Any:
        return torch.randint(-3, 4, shape, generator=draw).float() / 4  # full of ties, and exact

    batch, q_heads, kv_heads = (2, 4, 2) if name == "count" else (1, 2, 1)
    tokens, dim, pages, size = 3, 4, 9, 2
    q, k, v = grid(batch, q_heads, tokens, dim), *(grid(batch, kv_heads, tokens, dim) for _ in range(2))
    pools = [grid(batch * pages, kv_heads, size, dim) for _ in range(2)]
    table = torch.randperm(batch * pages, generator=draw).to(torch.int32).view(batch, pages)
    lengths = torch.randint(0, size + 1, (batch, pages), generator=draw).to(torch.int32)
    if name == "more than there are":
        lengths[0, 3:] = 0
    whole = Context(*pools, table, lengths)
    reference = grid(*q.shape) if {"count", "mass"} & set(given) else None
    rule = RankedPass(**{"budget": 2, "reference": reference, **given})
    want = ops.attend_ranked(q, k, v, whole, ops.page_bounds(whole), rule, None)
    owner = torch.randint(ranks, (batch, pages), generator=draw)
    shards = [ShardedContext.of(whole, owner == rank) for rank in range(ranks)]
    scores = [ops.page_scores(q, ops.page_bounds(shard.local)) for shard in shards]
    changes = scores[0] if reference is None else ranked.change_of(q, reference)
    if reference is not None:
        assert torch.equal(changes, ops.query_change(q, reference))
    group = Ranks(ranks, *ranked.message_of(q, shards[0], rule))
    for _ in range(2):
        results = group.exchange(
            lambda rank, box, number, phase:
            ranked.choose(rank, box, scores[number], changes, shards[number], rule, q_heads, phase)
        )
        for active, mask in results:
            assert torch.equal(active, want.active)
            assert torch.equal(mask, want.selection.mask)
