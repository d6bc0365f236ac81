"""Kernels of the exchange, interpreted on the CPU: all ranks send, one after the other, then all receive."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:  # Triton decides when it is imported, so these tests need a process of their own

    def test_messages_arrive_and_merge_in_an_interpreted_process() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
                   "--rootdir", ".", "--import-mode=importlib", __file__]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "skipped" not in done.stdout

else:
    from sparse_dlm_attn import AttentionState
    from sparse_dlm_attn.operators import merge, reuse
    from sparse_dlm_attn_distributed import launches
    from sparse_dlm_attn_distributed.mailbox import Mailbox
    from sparse_dlm_attn_distributed.packing import packed, packed_bytes
    from sparse_dlm_attn_torch import TorchBackend

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
        programs = launches.programs_of_gather(words)
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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("case", ["pass", "pass with reuse", "context alone", "another shape"])
    @pytest.mark.parametrize("ranks", [2, 3])
    def test_merging_on_arrival_is_the_composed_merge(ranks: int, case: str, dtype: Any) -> None:
        shape = (1, 2, 3, 24) if case == "another shape" else (2, 4, 1, 16)
        keys, kv_heads = (19 if case == "another shape" else shape[2]), 2
        draw, ops = torch.Generator().manual_seed(5), TorchBackend()
        q = torch.randn(shape, generator=draw).to(dtype)
        k, v = (torch.randn((shape[0], kv_heads, keys, shape[3]), generator=draw).to(dtype) for _ in range(2))
        scale = 0.3
        block = None if case == "context alone" else launches.Block(q, k, v, scale)
        size = packed_bytes(q.shape[0] * q.shape[1] * q.shape[2], q.shape[3], q.element_size())
        group = Ranks(ranks, size, launches.programs_of_merge(q[..., 0].numel()))
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
