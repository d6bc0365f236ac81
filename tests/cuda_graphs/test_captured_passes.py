"""Captured passes give the bits of passes that were not captured, over blocks of several lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="graphs are PyTorch's")

from plain_backends import TorchOperators  # noqa: E402
from policy_cases import EVERY_POLICY, Block, make_block  # noqa: E402
from tape import Tape  # noqa: E402

from sparse_dlm_attn import CallOrderError, Context, Decoder, UnsupportedError, get_policy  # noqa: E402
from sparse_dlm_attn.capabilities import Capabilities  # noqa: E402
from sparse_dlm_attn.decoder import DecoderPass  # noqa: E402
from sparse_dlm_attn_cuda_graphs import CapturedPasses, is_capturing, why_not  # noqa: E402

LAYERS, SIZE, CAPACITY = 2, 4, 9
POLICIES = [name for name in EVERY_POLICY if not get_policy(name).counts_passes]


def decoder(policy: Any) -> Decoder:
    return Decoder(policy, TorchOperators(), layers=LAYERS, check_contents=False)


def blocks() -> list[Block]:
    """Three blocks whose contexts differ in what they hold, in the same memory, as a loop has them."""
    first = make_block(0, passes=5, segments=False).converted(torch.from_numpy)
    made = [make_block(seed, passes=5, segments=False).converted(torch.from_numpy) for seed in range(3)]
    for block, tokens in zip(made, ((17, 30), (23, 36), (1, 12)), strict=True):
        starts = torch.arange(CAPACITY) * SIZE
        lengths = (torch.tensor(tokens)[:, None] - starts).clamp(0, SIZE).to(torch.int32)
        object.__setattr__(
            block, "context", Context(first.context.k_pages, first.context.v_pages, block.context.page_table, lengths)
        )
    return made


def forward(step: DecoderPass, q: Any, k: Any, v: Any) -> dict[str, Any]:
    out = step(0, q, k, v)
    return {"last": step(1, q + out, k, v), "first": out, "name": "kept"}


def run(run_pass: Any, steps: Decoder, start: Any, block: Block, save: int) -> list[Any]:
    start([block.context] * LAYERS)
    decoded, outs = torch.zeros_like(block.newly[0]), []
    for index in range(block.passes):
        decoded = decoded | block.newly[index]
        step = steps.next_pass(decoded, is_save=index == save)
        out = run_pass(step, block.q[index], block.k, block.v)
        density = [traffic.density for traffic in step.traffic]
        outs.append((out["last"], out["first"], *density))
    steps.finish_block()
    return outs


@pytest.mark.parametrize("policy", POLICIES)
def test_replays_have_the_bits_of_plain_passes_over_blocks_of_other_lengths(policy: str) -> None:
    plain, graphed = decoder(policy), decoder(policy)
    captured = CapturedPasses(graphed, forward, graph=Tape)
    for number, block in enumerate(blocks()):
        if plain.attention.policy.memory_scope == "sequence":  # these blocks are of sequences of their own
            plain.reset()
            graphed.reset()
        before = captured.captures
        wanted = run(forward, plain, plain.start_block, block, save=4)
        got = run(captured, graphed, captured.start_block, block, save=4)
        for want, have in zip(wanted, got, strict=True):
            for one, other in zip(want, have, strict=True):
                assert torch.equal(one, other)
        if number == 2 and "sparsed" not in policy:
            assert captured.captures == before  # nothing new
    assert captured.captures >= 2


@pytest.mark.parametrize(
    "policy", ["dense", "quest:budget=8", "losa:active=2,budget=8", "mage:budget=8,dense_layers=0"]
)
def test_a_few_graphs_serve_every_block(policy: str) -> None:
    steps = decoder(policy)
    captured = CapturedPasses(steps, forward, graph=Tape)
    for block in blocks() * 2:
        run(captured, steps, captured.start_block, block, save=4)
    assert captured.captures <= 4  # first pass, the one that builds bounds, others, save pass


def test_results_are_copies_and_reports_are_of_their_own_pass() -> None:
    steps, block = decoder("losa:active=2,budget=8"), blocks()[0]
    captured = CapturedPasses(steps, forward, graph=Tape)
    captured.start_block([block.context] * LAYERS)
    kept, last = [], None
    for index in range(5):
        last = steps.next_pass()
        out = captured(last, block.q[index], block.k, block.v)
        kept.append((out["last"], out["last"].clone(), last.traffic[0].active, last.traffic[0].active.clone()))
        assert out["name"] == "kept"
    assert captured.captures == 1
    for out, copy, active, same in kept:
        assert torch.equal(out, copy)
        assert torch.equal(active, same)


def test_sequences_at_different_passes_share_a_graph() -> None:
    policy, made = "losa:active=2,budget=8", blocks()
    numbers = ((0, 0), (1, 1), (2, 0), (3, 1), (0, 2), (1, 3))  # sequence 1 begins its next block in pass 2, 0 in 4
    plain, graphed = decoder(policy), decoder(policy)
    captured = CapturedPasses(graphed, forward, graph=Tape)
    plain.start_block([made[0].context] * LAYERS)
    captured.start_block([made[0].context] * LAYERS)
    for at, number in enumerate(numbers):
        index = torch.tensor(number, dtype=torch.int32)
        q = made[0].q[min(at, 4)]
        if at == 2:
            captured.replace_contexts([made[0].context] * LAYERS)
        want = forward(plain.next_pass(index=index), q, made[0].k, made[0].v)
        got = captured(graphed.next_pass(index=index), q, made[0].k, made[0].v)
        assert torch.equal(want["last"], got["last"])
    assert captured.captures == 1


def test_sequences_that_begin_a_block_read_what_they_hold_by_then() -> None:
    first, _, _ = made = blocks()
    table, lengths = first.context.page_table.clone(), first.context.page_lengths.clone()
    lengths[1] = made[1].context.page_lengths[1]  # sequence 1 has grown
    grown = Context(first.context.k_pages, first.context.v_pages, table, lengths)
    steps = decoder("quest:budget=8")
    captured = CapturedPasses(steps, forward, graph=Tape)
    captured.start_block([first.context] * LAYERS)
    for at in range(4):
        if at == 2:
            captured.replace_contexts([grown] * LAYERS)
        index = torch.tensor((at, at % 2), dtype=torch.int32)
        got = captured(steps.next_pass(index=index), first.q[at], first.k, first.v)
    alone = decoder("quest:budget=8")
    alone.start_block([grown] * LAYERS)
    want = forward(alone.next_pass(index=torch.tensor((3, 1), dtype=torch.int32)), first.q[3], first.k, first.v)
    assert torch.equal(got["last"], want["last"])
    assert captured.captures == 1


def test_what_a_graph_cannot_keep_is_refused_with_every_reason() -> None:
    with pytest.raises(UnsupportedError) as caught:
        CapturedPasses(decoder("dkv-cache"), forward)
    assert len(caught.value.reasons) == 2
    assert "plain-torch" in caught.value.reasons[0] and "counts_passes" in caught.value.reasons[1]
    assert why_not(Decoder("losa", OnCuda(), layers=1)) == []
    assert "check_contents" in why_not(Decoder("losa", OnCuda(), layers=1, check_contents=True))[0]
    assert not is_capturing()


class OnCuda(TorchOperators):
    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(devices=("cuda",))


def test_calls_out_of_order_are_refused_and_change_nothing() -> None:
    steps, block = decoder("dense"), blocks()[0]
    captured = CapturedPasses(steps, forward, graph=Tape)
    contexts = [block.context] * LAYERS
    with pytest.raises(CallOrderError, match="within a block"):
        captured.replace_contexts(contexts)
    captured.start_block(contexts)
    with pytest.raises(CallOrderError, match="under way"):
        captured.start_block(contexts)
    other = replace(block.context, k_pages=block.context.k_pages.clone())
    with pytest.raises(CallOrderError, match="lie where those of the block lie"):
        captured.replace_contexts([other] * LAYERS)
    step = steps.next_pass()
    step(0, block.q[0], block.k, block.v)
    with pytest.raises(CallOrderError, match="replayed"):
        step.replayed(steps.memories, tuple)


def test_work_that_reads_a_tensor_is_an_error_not_a_constant() -> None:
    def reads(step: DecoderPass, q: Any, k: Any, v: Any) -> Any:
        return forward(step, q, k, v)["last"] * float(q.sum())

    steps, block = decoder("dense"), blocks()[0]
    captured = CapturedPasses(steps, reads, graph=Tape)
    captured.start_block([block.context] * LAYERS)
    captured(steps.next_pass(), block.q[0], block.k, block.v)
    captured(steps.next_pass(), block.q[1], block.k, block.v)
    with pytest.raises(RuntimeError, match="reads a tensor on the host"):
        captured(steps.next_pass(), block.q[2], block.k, block.v)
    assert captured.captures == 0 and not is_capturing()
    reading = steps.current
    assert reading is not None and reading.missing == (0, 1)
