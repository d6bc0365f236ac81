"""Decoding over the whole sequence with policies: rows left out, windows, orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import PassInfo, PrefixAttention, SparseAttentionError
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.policies.dense import Dense
from sparse_dlm_attn_small_model.cache import KVCache
from sparse_dlm_attn_small_model.config import MASK_ID
from sparse_dlm_attn_small_model.decoding import decode_full_sequence
from sparse_dlm_attn_small_model.model import TinyModel

LENGTH, NEW = 30, 16
EVERY = np.arange(LENGTH + NEW)


def cache_of(model: TinyModel) -> KVCache:
    return KVCache(model.config, model.backend, whole=True, capacity=LENGTH + NEW, prompt_tokens=LENGTH, page_size=4)


def run(model: TinyModel, tokens: list[int], rows: Any, cache: KVCache) -> Any:
    attention = PrefixAttention("dense", model.backend)
    return to_numpy(model.forward([tokens], cache, attention, PassInfo(0), rows=rows)[0])[0]


@pytest.mark.clause("DRIVER-4")
def test_a_whole_sequence_as_context_gives_the_logits_of_one_block(model: TinyModel, text: bytes) -> None:
    tokens = [*text[:LENGTH], *[MASK_ID] * NEW]
    one_block = run(model, tokens, None, model.empty_cache(page_size=1))
    np.testing.assert_allclose(run(model, tokens, EVERY, cache_of(model)), one_block, atol=2e-4)


@pytest.mark.clause("POLICY-7")
def test_rows_left_out_keep_their_keys_and_the_others_see_them(model: TinyModel, text: bytes) -> None:
    tokens = [*text[:LENGTH], *[MASK_ID] * NEW]
    cache = cache_of(model)
    whole = run(model, tokens, EVERY, cache)
    window = np.arange(LENGTH, LENGTH + 8)
    again = run(model, tokens, window, cache)  # nothing has changed, so nothing may differ
    np.testing.assert_allclose(again[window], whole[window], atol=2e-4)
    assert not again[np.setdiff1d(EVERY, window)].any()
    changed = [ord("x") if place == 3 else token for place, token in enumerate(tokens)]
    stale = run(model, changed, window, cache)  # row 3 is not computed: nobody can see the change
    np.testing.assert_allclose(stale[window], whole[window], atol=2e-4)
    fresh = run(model, changed, EVERY, cache)
    assert np.abs(fresh[window] - whole[window]).max() > 1e-3


def test_the_sequence_is_its_own_context_and_filled_in_by_confidence(model: TinyModel, text: bytes) -> None:
    result = decode_full_sequence(model, text[:21], new_tokens=12, steps=5)
    assert [len(record.newly_decoded) for record in result.passes] == [3, 3, 2, 2, 2]
    assert sorted(p for record in result.passes for p in record.newly_decoded) == list(range(12))
    assert bytes(result.passes[-1].tokens) == result.generated
    total = result.traffic()
    assert total.context_tokens == 5 * model.config.layers * model.config.kv_heads * (21 + 12)
    assert (total.density, total.pair_share, total.row_share, total.metadata_bytes) == (1, 1, 1, 0)


def test_windows_are_filled_from_the_left_and_stop(model: TinyModel, changed: Any) -> None:
    answer = [1] * 8 + [ord("a")] * 8 + [ord("b"), 0, *[ord("c")] * 22]

    def change(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        logits[0, np.arange(40), answer] = 50 + np.arange(40)

    scripted = changed(model, change)
    result = decode_full_sequence(scripted, b"p" * 8, new_tokens=32, steps=2, block_length=8)
    assert scripted.inputs[0] == [[*b"p" * 8, *[MASK_ID] * 32]]
    assert [(record.block, record.index) for record in result.passes] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert scripted.inputs[2][0][16:] == [MASK_ID] * 24
    assert (result.output, result.stopped) == (b"a" * 8 + b"b", True)
    assert [info.index for info in scripted.infos] == [0, 1, 2, 3]
    assert {info.total_passes for info in scripted.infos} == {8}


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ("dense", [46] * 8),
        ("fast-dllm", [46, 8, 8, 8] * 2),
        ("sparse-dllm:ratio=1", [46, 46, 8, 8] * 2),
        ("fast-dllm:mode=prefix", [46, 16, 16, 16, 46, 8, 8, 8]),
    ],
)
@pytest.mark.clause("POLICY-7")
def test_the_loop_computes_the_rows_that_the_policy_names(
    model: TinyModel, text: bytes, policy: str, rows: list[int]
) -> None:
    result = decode_full_sequence(
        model, text[:LENGTH], policy=policy, new_tokens=NEW, block_length=8, steps=4, page_size=1
    )
    assert [record.reads.computed_rows for record in result.passes] == rows[: len(result.passes)]
    assert all(record.reads.rows == LENGTH + NEW for record in result.passes)


@pytest.mark.clause("POLICY-7")
def test_dkv_cache_computes_what_is_masked_or_was_just_decoded(model: TinyModel, text: bytes) -> None:
    result = decode_full_sequence(model, text[:LENGTH], policy="dkv-cache", new_tokens=NEW, steps=16)
    # Before pass i, i tokens are decoded, one of them after pass i - 1; pass 8 reloads.
    rows = [46 if index in (0, 1, 8) else 16 - index + 1 for index in range(16)]
    assert [record.reads.computed_rows for record in result.passes] == rows


def test_a_random_order_is_that_of_its_seed_whatever_the_policy(model: TinyModel, text: bytes) -> None:
    def order(seed: int, policy: str = "dkv-cache:mode=greedy,neighbours=1") -> Any:
        result = decode_full_sequence(
            model, text[:LENGTH], policy=policy, new_tokens=NEW, steps=8, order="random", seed=seed
        )
        return result, [record.newly_decoded for record in result.passes]

    first, places = order(0)
    assert order(0)[1] == order(0, "dense")[1] == places != order(1)[1]
    assert sorted(place for part in places for place in part) == list(range(NEW))
    # Between reloads: two just decoded, two about to be, and at most one neighbour of each of these.
    rows = [record.reads.computed_rows for record in first.passes]
    assert all(2 <= count <= 6 for count in rows[1::2]) and set(rows[::2]) == {46}


@pytest.mark.parametrize(("steps", "length"), [(2, 8), (4, 8), (8, 16)])
def test_a_policy_is_told_the_rows_of_a_pass_in_the_order_drawn(
    model: TinyModel, text: bytes, steps: int, length: int
) -> None:
    told: dict[int, PassInfo] = {}

    class Listening(Dense):
        def computed_tokens(self, info: PassInfo, rows: Any) -> Any:
            told[info.index] = info
            return rows

    result = decode_full_sequence(
        model,
        text[:LENGTH],
        policy=Listening(),
        new_tokens=NEW,
        block_length=length,
        steps=steps,
        order="random",
        seed=3,
    )
    rng = np.random.default_rng(3)
    drawn = [LENGTH + first + rng.permutation(length) for first in range(0, NEW, length)]
    parts = np.concatenate(drawn).reshape(-1, length // steps).tolist()
    for info, record, rows in zip(told.values(), result.passes, parts, strict=not result.stopped):
        assert to_numpy(info.planned_order).tolist() == [rows]
        assert np.flatnonzero(to_numpy(info.planned)).tolist() == sorted(rows)
        assert [place + LENGTH for place in record.newly_decoded] == sorted(rows)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (b"", {}),
        (bytes(600), {}),
        (bytes(500), {"new_tokens": 13}),
        (b"x", {"new_tokens": 0}),
        (b"x", {"steps": 17}),
        (b"x", {"steps": 2, "threshold": 0.5}),
        (b"x", {"block_length": 5}),
        (b"x", {"block_length": 0}),
        (b"x", {"on_pass": 1}),
        ("x", {}),
        (b"x", {"page_size": 0}),
        (b"x", {"order": "left"}),
        (b"x", {"seed": -1}),
        (b"x", {"order": "random", "threshold": 0.5}),
        (b"x", {"policy": "losa:active=-1"}),
    ],
)
def test_bad_input_is_refused(model: TinyModel, prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(SparseAttentionError):
        decode_full_sequence(model, prompt, **options)
