"""Decoding over the whole sequence with policies: rows left out, windows, orders, segments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import InvalidArgumentError, PassInfo, PrefixAttention
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.policies.dense import Dense
from sparse_dlm_attn_tiny.config import MASK_ID
from sparse_dlm_attn_tiny.decoding import decode_blocks, decode_full_sequence
from sparse_dlm_attn_tiny.model import TinyModel
from sparse_dlm_attn_tiny.sequence import SequenceCache

LENGTH, NEW = 30, 16
EVERY = np.arange(LENGTH + NEW)


def cache_of(model: TinyModel, page_size: int = 4) -> SequenceCache:
    return SequenceCache(
        model.config, model.backend, tokens=LENGTH + NEW, prompt_tokens=LENGTH, page_size=page_size
    )


def run(model: TinyModel, tokens: list[int], rows: Any, cache: SequenceCache) -> Any:
    info = PassInfo(0)
    logits, _ = model.forward_sequence(
        tokens, rows, cache, len(tokens), PrefixAttention("dense", model.backend), info
    )
    return to_numpy(logits)


@pytest.mark.clause("DRIVER-4")
def test_a_whole_sequence_as_context_gives_the_logits_of_one_block(model: TinyModel, text: bytes) -> None:
    tokens = [*text[:LENGTH], *[MASK_ID] * NEW]
    contexts = model.empty_cache(page_size=1).contexts()
    attention = PrefixAttention("dense", model.backend)
    one_block = model.forward_block([tokens], 0, contexts, attention, PassInfo(0))
    got = run(model, tokens, EVERY, cache_of(model))
    np.testing.assert_allclose(got, to_numpy(one_block.logits)[0], atol=2e-4)


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


@pytest.mark.parametrize(
    ("policy", "shares"),
    [("dense", [46] * 8), ("fast-dllm", [46, 8, 8, 8] * 2), ("sparse-dllm:ratio=1", [46, 46, 8, 8] * 2),
     ("fast-dllm:mode=prefix", [46, 16, 16, 16, 46, 8, 8, 8])],
)
@pytest.mark.clause("POLICY-7")
def test_the_loop_computes_the_rows_that_the_policy_names(
    model: TinyModel, text: bytes, policy: str, shares: list[int]
) -> None:
    result = decode_full_sequence(
        model, text[:LENGTH], policy=policy, new_tokens=NEW, block_length=8, steps=4, page_size=1
    )
    if not result.stopped:
        assert [record.computed_rows for record in result.passes] == shares
    assert all(record.rows == LENGTH + NEW for record in result.passes)
    done = result.passes
    assert [record.index for record in done] == [0, 1, 2, 3] * (len(done) // 4)


@pytest.mark.clause("POLICY-7")
def test_dkv_cache_computes_what_is_masked_or_was_just_decoded(model: TinyModel, text: bytes) -> None:
    result = decode_full_sequence(model, text[:LENGTH], policy="dkv-cache", new_tokens=NEW, steps=16)
    rows = [record.computed_rows for record in result.passes]
    # Before pass i, i tokens are decoded, one of them after pass i - 1; pass 8 reloads.
    assert rows == [46 if index in (0, 1, 8) else 16 - index + 1 for index in range(16)]


def test_a_random_order_is_drawn_beforehand_and_told(model: TinyModel, text: bytes) -> None:
    def order(seed: int, policy: str = "dkv-cache:mode=greedy,neighbours=1") -> Any:
        return decode_full_sequence(
            model, text[:LENGTH], policy=policy, new_tokens=NEW, steps=8, order="random", seed=seed
        )

    first, again, other = order(0), order(0), order(1)
    places = [[record.newly_decoded for record in result.passes] for result in (first, again, other)]
    assert places[0] == places[1] != places[2]
    assert sorted(place for part in places[0] for place in part) == list(range(NEW))
    assert [[r.newly_decoded for r in order(0, "dense").passes]] == places[:1]
    # Between reloads: two just decoded, two about to be, and at most one neighbour of each of these.
    assert all(2 <= record.computed_rows <= 6 for record in first.passes[1::2])
    assert all(record.computed_rows == 46 for record in first.passes[::2])


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
        model, text[:LENGTH], policy=Listening(), new_tokens=NEW, block_length=length, steps=steps,
        order="random", seed=3,
    )
    rng, share = np.random.default_rng(3), length // steps
    drawn = [LENGTH + first + rng.permutation(length) for first in range(0, NEW, length)]
    parts = np.concatenate(drawn).reshape(-1, share).tolist()
    for info, record, rows in zip(told.values(), result.passes, parts, strict=not result.stopped):
        assert to_numpy(info.planned_order).tolist() == [rows]
        assert np.flatnonzero(to_numpy(info.planned)).tolist() == sorted(rows)
        assert [place + LENGTH for place in record.newly_decoded] == sorted(rows)


@pytest.mark.parametrize("policy", ["dense", "sparsed:span=8,warmup=1,ratio=1", "fast-dllm"])
def test_policies_that_leave_nothing_out_agree_in_one_pass(
    model: TinyModel, text: bytes, policy: str
) -> None:
    dense = decode_full_sequence(model, text[:LENGTH], new_tokens=NEW, steps=1)
    other = decode_full_sequence(model, text[:LENGTH], policy=policy, new_tokens=NEW, steps=1, page_size=8)
    assert other.generated == dense.generated


def test_sparsed_counts_passes_over_all_windows(model: TinyModel, text: bytes) -> None:
    """As the authors' LLaDA code does: later windows have no dense pass."""
    result = decode_full_sequence(
        model, text[:LENGTH], policy="sparsed:span=4,ratio=0.2", new_tokens=NEW, block_length=8, steps=4,
        page_size=4,
    )
    dense = [bool((record.pairs == record.dense_pairs).all()) for record in result.passes]
    assert dense == [index < 3 for index in range(len(dense))]  # floor(8 x 0.2) + 2


@pytest.mark.parametrize(("page_size", "prompt"), [(4, 30), (8, 30), (64, 30), (16, 32)])
def test_segments_are_prompt_generated_and_suffix(model: TinyModel, page_size: int, prompt: int) -> None:
    cache = SequenceCache(
        model.config, model.backend, tokens=46, prompt_tokens=prompt, page_size=page_size
    )
    labels = to_numpy(cache.contexts(38)[0].page_segments)[0]
    for page, label in enumerate(labels):
        first = page * page_size
        expected = 0 if first < prompt else 1 if first < 38 else 2
        if page + 1 == len(labels) and expected == 0:
            expected = 1  # the last page is never of the prompt
        assert label == expected


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    "options",
    [{"page_size": 0}, {"order": "left"}, {"seed": -1}, {"order": "random", "threshold": 0.5},
     {"policy": "losa:active=-1"}],
)
def test_bad_options_are_refused(model: TinyModel, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        decode_full_sequence(model, b"some text", **options)


@pytest.mark.clause("POLICY-7", "DRIVER-3")
def test_within_a_block_rows_decoded_two_passes_ago_are_not_computed(model: TinyModel, text: bytes) -> None:
    result = decode_blocks(model, text[:32], policy="dkv-cache", block_length=8, steps=8, max_blocks=1)
    rows = [record.computed_rows for record in result.passes]
    assert rows == [8, 8, 7, 6, 5, 4, 3, 2, 8]  # the save pass computes all rows
    active = [record.active_rows.tolist() for record in result.passes]
    assert active == [[count] * model.config.layers for count in rows]
    dense = decode_blocks(model, text[:32], policy="dense", block_length=8, steps=8, max_blocks=1)
    assert result.passes[0].newly_decoded == dense.passes[0].newly_decoded


@pytest.mark.parametrize("policy", ["fast-dllm", "fast-dllm:mode=prefix"])
def test_a_block_causal_model_has_nothing_to_refresh(model: TinyModel, text: bytes, policy: str) -> None:
    one, two = (
        decode_blocks(model, text[:40], policy=name, block_length=8, steps=4, max_blocks=2)
        for name in (policy, "dense")
    )
    assert one.generated == two.generated
    assert one.traffic().pairs == two.traffic().pairs
