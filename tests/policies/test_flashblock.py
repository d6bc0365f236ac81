"""flashblock refreshes all rows or none, by what was decoded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from policy_cases import Array, Block, denoise, make_block

from sparse_dlm_attn import InvalidArgumentError, PassInfo, PrefixAttention

REFERENCE = PrefixAttention("dense").backend


def decoding(block: Block, rows: list[list[int]]) -> Block:
    """Let both sequences decode ``rows[t]`` after pass ``t - 1``."""
    newly = np.zeros((len(rows), 2, 6), bool)
    for step, decoded in enumerate(rows):
        newly[step][:, decoded] = True
    return replace(block, newly=newly)


def refreshes(policy: str, block: Block) -> list[bool]:
    seen = []
    for _, memory in denoise(policy, block):
        assert memory.active.all() or not memory.active.any()
        np.testing.assert_array_equal(memory.traffic.density, float(memory.active.all()))
        seen.append(bool(memory.active.all()))
    return seen


@pytest.mark.parametrize(
    ("parameters", "decoded", "expected"),
    [
        ("limit=2", [[], [0], [1], [2], [3], []], [1, 0, 1, 0, 1, 1]),
        ("limit=2", [[], [0, 1], [], [2], [4, 5], []], [1, 1, 0, 0, 1, 1]),
        ("limit=3", [[], [0], [1], [2], [3], []], [1, 0, 0, 1, 0, 1]),
        ("limit=3,save_pass=reuse", [[], [0], [1], [2], [3], [4, 5]], [1, 0, 0, 1, 0, 0]),
        ("limit=1", [[], [], [3], [], [], []], [1, 0, 1, 0, 0, 1]),
        ("limit=0", [[], [], [], [], [], []], [1, 1, 1, 1, 1, 1]),
        ("limit=2", [[0, 1, 2], [3], [4], [5], [], []], [1, 0, 1, 0, 0, 1]),  # pass 0 counts nothing
        ("limit=2", [[], [0], [0], [0], [0], []], [1, 0, 0, 0, 0, 1]),  # a row is dirty once
    ],
)
def test_it_refreshes_when_enough_tokens_were_decoded_since_the_last_time(
    parameters: str, decoded: list[list[int]], expected: list[int]
) -> None:
    block = decoding(make_block(60, passes=6), decoded)
    assert refreshes(f"flashblock:{parameters}", block) == [bool(e) for e in expected]


@pytest.mark.parametrize("dirty_rows", ["drop", "keep"])
def test_dirty_rows_attend_within_the_block_only_or_reuse(dirty_rows: str) -> None:
    block = decoding(make_block(62), [[], [2], [3], []])
    passes = list(denoise(f"flashblock:limit=3,dirty_rows={dirty_rows}", block))
    first = passes[0][1].state
    for index, dirty in ((1, [2]), (2, [2, 3])):
        out, memory = passes[index]
        inner = REFERENCE.attend_block(block.q[index], block.k, block.v)
        merged = REFERENCE.merge(first, inner).out
        for row in range(6):
            dropped = row in dirty and dirty_rows == "drop"
            wanted: Array = inner.out if dropped else merged
            np.testing.assert_allclose(out[:, :, row], wanted[:, :, row], atol=1e-6)
        assert np.isneginf(memory.state.lse[:, :, dirty]).all() == (dirty_rows == "drop")
    # The refresh of the save pass brings every row back.
    assert np.isfinite(passes[3][1].state.lse).all()


def test_it_asks_for_the_decoded_tokens_and_leaves_the_memory_usable() -> None:
    block = make_block(63)
    attention = PrefixAttention("flashblock")
    _, memory = attention(block.q[0], block.k, block.v, block.context, None, PassInfo(0))
    with pytest.raises(InvalidArgumentError, match=r"info\.newly_decoded .*PassInfo\(index, newly_decoded"):
        attention(block.q[1], block.k, block.v, block.context, memory, PassInfo(1))
    info = PassInfo(1, newly_decoded=np.zeros((2, 6), bool))
    _, again = attention(block.q[1], block.k, block.v, block.context, memory, info)
    np.testing.assert_array_equal(again.state.out, memory.state.out)
