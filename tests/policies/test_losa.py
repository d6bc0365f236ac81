"""losa: which rows are active, what they read, and what the others keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from policy_cases import Array, denoise, make_block

from sparse_dlm_attn import PassInfo, PrefixAttention


def test_slow_drift_goes_unnoticed_against_the_previous_pass_only() -> None:
    block = make_block(41, passes=5)
    q = np.repeat(block.q[:1], 5, axis=0)
    for step in range(5):
        q[step, :, :, 0] += 0.25 * step  # row 0 creeps away
        q[step, :, :, 1] += 0.375 * (step % 2)  # row 1 jumps to and fro, a little further in each pass
    seen = {}
    for drift in ("previous", "refresh"):
        memories = [memory for _, memory in denoise(f"losa:active=1,drift={drift}", replace(block, q=q))]
        seen[drift] = [np.flatnonzero(memory.active[0]).tolist() for memory in memories[1:4]]
    assert seen == {"previous": [[1], [1], [1]], "refresh": [[1], [0], [0]]}


@pytest.mark.parametrize("parameters", ["active=0", "mass=0"])
def test_without_active_rows_the_dense_first_pass_is_frozen(parameters: str) -> None:
    block = make_block(44)
    frozen = list(denoise(f"losa:{parameters}", block))
    never = denoise("flashblock:limit=99,dirty_rows=keep,save_pass=reuse", block)
    for (out, memory), (other_out, _) in zip(frozen, never, strict=True):
        np.testing.assert_array_equal(memory.state.out, frozen[0][1].state.out)
        np.testing.assert_array_equal(out, other_out)
    for _, memory in frozen[1:]:
        assert not memory.active.any()
        assert float(memory.traffic.bytes_read.sum()) == 0  # no page, and no bounds to choose pages by


def test_any_mass_above_zero_refreshes_a_row_once_something_moved() -> None:
    block = make_block(46)
    for _, memory in list(denoise("losa:mass=0.000001", block))[1:]:
        assert (memory.active.sum(axis=1) == 1).all()


def test_the_active_set_is_the_same_before_and_after_a_rotary_embedding() -> None:
    block = make_block(47, head_dim=8)
    angle = np.random.default_rng(0).random((6, 4)) * 6  # a row's position, a frequency for each pair

    def rotated(q: Array) -> Array:
        left, right = q[..., 0::2], q[..., 1::2]
        turned = np.empty_like(q)
        turned[..., 0::2] = left * np.cos(angle) - right * np.sin(angle)
        turned[..., 1::2] = left * np.sin(angle) + right * np.cos(angle)
        return turned

    noise = np.random.default_rng(1).standard_normal(block.q.shape).astype(np.float32)  # no ties
    plain = replace(block, q=block.q + noise)
    turned = replace(plain, q=rotated(plain.q))
    for rule in ("active=2", "mass=0.5"):
        for (_, one), (_, other) in zip(denoise(f"losa:{rule}", plain), denoise(f"losa:{rule}", turned), strict=True):
            np.testing.assert_array_equal(one.active, other.active)


@pytest.mark.parametrize("save_pass", ["step", "dense", "reuse"])
def test_a_save_pass_that_is_the_first_pass_is_dense(save_pass: str) -> None:
    block = make_block(49)
    attention = PrefixAttention(f"losa:budget=4,save_pass={save_pass}")
    _, memory = attention(block.q[0], block.k, block.v, block.context, None, PassInfo(0, is_save=True))
    assert memory.active.all()
    np.testing.assert_array_equal(memory.traffic.density, 1)
