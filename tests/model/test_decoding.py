"""Decoding block by block over a prefix, alone and together: schedules, passes, what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn_small_model.cache import KVCache
from sparse_dlm_attn_small_model.config import MASK_ID
from sparse_dlm_attn_small_model.decoding import decode_blocks, decode_together
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.records import Decoded, PassRecord

POLICIES = [
    "dense",
    "sliding-window:window=32",
    "streaming-llm:sinks=16,window=32",
    "quest:budget=32",
    "losa:budget=32",
    "flashblock",
    "mage:budget=32",
    "sparsed",
]
RISING = np.linspace(0.1, 0.8, 8)
LETTERS = list(b"abcdefgh")
Script = Callable[..., Any]


@pytest.fixture
def script(model: TinyModel, changed: Any) -> Script:
    """Return a function that makes the model say some bytes with some confidence, block for block."""

    def make(best: Sequence[int], confidence: Any, then: Sequence[int] | None = None) -> Any:
        def change(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
            said = best if then is None or number < 9 else then  # eight passes and one that saves
            logits[0] = np.log((1 - np.asarray(confidence)) / 255)[:, None]
            logits[0, np.arange(len(said)), said] = np.log(confidence)

        return changed(model, change)

    return make


def order_of(model: TinyModel, **options: Any) -> list[tuple[int, ...]]:
    """Positions decoded after each denoising pass of the first block."""
    result = decode_blocks(model, b"x" * 8, policy="dense", block_length=8, max_blocks=1, **options)
    return [record.newly_decoded for record in result.passes if not record.is_save]


@pytest.mark.parametrize(("steps", "counts"), [(3, [3, 3, 2]), (8, [1] * 8), (1, [8]), (5, [2, 2, 2, 1, 1])])
def test_the_fixed_schedule_gives_the_rest_to_the_first_passes(script: Script, steps: int, counts: list[int]) -> None:
    assert [len(positions) for positions in order_of(script(LETTERS, RISING), steps=steps)] == counts


def test_the_surest_tokens_are_decoded_first_and_equally_sure_ones_from_the_left(script: Script) -> None:
    assert order_of(script(LETTERS, RISING), steps=4) == [(6, 7), (4, 5), (2, 3), (0, 1)]
    assert order_of(script(LETTERS, np.full(8, 0.5)), steps=4) == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_a_threshold_decodes_what_is_strictly_above_it_and_at_least_the_best(script: Script) -> None:
    confidence = np.asarray([0.3, 0.95, 0.6, 0.9, 0.2, 0.7, 0.1, 0.15])
    order = order_of(script(LETTERS, confidence), threshold=0.65)
    assert order == [(1, 3, 5), (2,), (0,), (4,), (7,), (6,)]
    one_by_one = [(position,) for position in range(8)]
    for threshold, expected in ((1 / 256, one_by_one), (0.0, [tuple(range(8))]), (1.0, one_by_one)):
        assert order_of(script(LETTERS, np.full(8, 1 / 256)), threshold=threshold) == expected


def test_prompt_bytes_in_the_first_block_stay_and_are_fed_as_decoded(script: Script) -> None:
    scripted = script(LETTERS, RISING)
    options: dict[str, Any] = {"policy": "dense", "block_length": 8, "steps": 2}
    result = decode_blocks(scripted, b"x" * 8 + b"\x00yz", max_blocks=2, **options)
    assert scripted.inputs[0] == [[0, *b"yz", *[MASK_ID] * 5]]
    assert [len(record.newly_decoded) for record in result.passes[:3]] == [4, 1, 0]
    assert result.passes[2].tokens == (0, *b"yzdefgh")
    assert result.generated == b"defgh" + b"abcdefgh"
    assert not result.stopped  # a stop byte in the prompt stops nothing
    assert result.prefilled_tokens == 8
    # Two masks, four tokens a pass: the surplus overwrites nothing.
    result = decode_blocks(script(LETTERS, RISING[::-1]), b"x" * 8 + b"uvwxyz", max_blocks=1, **options)
    assert [record.newly_decoded for record in result.passes] == [(6, 7), ()]
    assert result.passes[-1].tokens == tuple(b"uvwxyzgh")


def test_decoding_ends_with_the_block_that_holds_a_stop_byte_or_with_the_last(script: Script) -> None:
    options: dict[str, Any] = {"policy": "dense", "block_length": 8}
    ends = b"no\x00\x00\x00\x00\x00z"
    result = decode_blocks(script(LETTERS, RISING, list(ends)), b"x" * 8, max_blocks=5, **options)
    assert (result.output, result.stopped, result.blocks) == (b"abcdefghno", True, 2)
    assert result.generated == b"abcdefgh" + ends
    result = decode_blocks(script(LETTERS, RISING), b"x" * 8, max_blocks=3, **options)
    assert (result.output, result.stopped, result.blocks) == (b"abcdefgh" * 3, False, 3)


def test_every_pass_is_told_where_it_stands(script: Script) -> None:
    scripted = script(LETTERS, RISING)
    decode_blocks(scripted, b"x" * 8 + b"pq", policy="dense", block_length=8, steps=4, max_blocks=2)
    infos = scripted.infos
    assert [info.index for info in infos] == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert [info.is_save for info in infos] == [False] * 3 + [True] + [False] * 4 + [True]
    assert [info.total_passes for info in infos] == [3] * 4 + [4] * 5
    before = None
    for info, tokens in zip(infos, scripted.inputs, strict=True):
        decoded = np.asarray(tokens) != MASK_ID
        np.testing.assert_array_equal(to_numpy(info.decoded), decoded)
        since = np.zeros((1, 8), dtype=bool) if info.index == 0 else decoded & ~before
        np.testing.assert_array_equal(to_numpy(info.newly_decoded), since)
        before = decoded
    by_threshold = script(LETTERS, RISING)
    decode_blocks(by_threshold, b"x", policy="dense", block_length=8, threshold=0.5, max_blocks=1)
    assert {info.total_passes for info in by_threshold.infos} == {None}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prompt_tokens", [3, 16, 81])
def test_every_policy_decodes_after_prompts_of_any_length(
    model: TinyModel, text: bytes, policy: str, prompt_tokens: int
) -> None:
    prompt = text[:prompt_tokens].replace(b"\x00", b"-")
    result = decode_blocks(model, prompt, policy=policy, steps=3, max_blocks=2, page_size=10)
    assert len(result.generated) == 16 * result.blocks - prompt_tokens % 16 > 0
    assert all(record.reads.density <= 1 for record in result.passes)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_shared_prefix_changes_no_result_and_is_not_changed(model: TinyModel, text: bytes, policy: str) -> None:
    prefix = model.prefill(text[:100])
    alone = decode_blocks(model, text[:100], policy=policy, max_blocks=3)
    for _ in range(2):
        shared = decode_blocks(model, text[:100], policy=policy, max_blocks=3, prefix=prefix)
        assert (shared.generated, shared.traffic()) == (alone.generated, alone.traffic())
    assert (prefix.length, prefix.version) == (96, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_together_or_one_by_one_makes_no_difference(model: TinyModel, text: bytes, policy: str) -> None:
    prompts = [text[start : start + 77] for start in (0, 100, 200)]
    prefix = KVCache.together([model.prefill(prompt, page_size=8) for prompt in prompts])
    options: dict[str, Any] = {"policy": policy, "steps": 4}
    joint = decode_together(model, prompts, prefix=prefix, max_blocks=[1, 3, 2], **options)
    for prompt, blocks, got in zip(prompts, [1, 3, 2], joint, strict=True):
        alone = decode_blocks(model, prompt, max_blocks=blocks, page_size=8, **options)
        assert facts_of(got) == facts_of(alone)
    assert (prefix.length, prefix.batch) == (64, 3)


def facts_of(decoded: Decoded) -> list[Any]:
    passes = [
        (
            record.block,
            record.index,
            record.is_save,
            record.tokens,
            record.newly_decoded,
            record.reads,
            record.active_rows.tolist(),
            record.loaded.tolist(),
        )
        for record in decoded.passes
    ]
    totals = [decoded.traffic(), decoded.traffic(first_pass=False)]
    return [decoded.output, decoded.generated, decoded.stopped, decoded.prefilled_tokens, passes, totals]


@pytest.mark.clause("POLICY-1")
@pytest.mark.parametrize("policy", ["dense", "losa:budget=32"])
def test_other_backends_decode_the_same(make_model: Callable[..., TinyModel], text: bytes, policy: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    ours, theirs = (
        decode_blocks(make_model(backend), text[:70], policy=policy, steps=4, max_blocks=2)
        for backend in ("reference", "torch")
    )
    assert (theirs.generated, theirs.traffic()) == (ours.generated, ours.traffic())


@pytest.mark.clause("DENSITY-1", "DENSITY-2")
def test_dense_decoding_reads_everything_in_every_pass(model: TinyModel, text: bytes) -> None:
    result = decode_blocks(model, text[:64], policy="dense", steps=2, max_blocks=2)
    config = model.config
    parts = config.kv_heads * config.layers
    tokens = [64] * 3 + [80] * 3
    assert [record.reads.context_tokens for record in result.passes] == [parts * each for each in tokens]
    total, without = result.traffic(), result.traffic(first_pass=False)
    token_bytes = 2 * 4 * config.head_dim * parts
    assert total.page_bytes == total.dense_bytes == token_bytes * sum(tokens)
    assert (total.metadata_bytes, total.build_bytes) == (0, 0)
    assert (without.passes, without.page_bytes) == (4, token_bytes * (2 * 64 + 2 * 80))
    assert (total.density, total.byte_share, without.byte_share) == (1, 1, 1)
    assert all(record.loaded.all() and (record.active_rows == 16).all() for record in result.passes)
    assert result.passes[-1].loaded.shape == (config.layers, config.kv_heads, 5)


@pytest.mark.clause("DENSITY-2")
def test_building_bounds_is_charged_once_to_policies_that_read_them(model: TinyModel, text: bytes) -> None:
    policy = "quest:budget=16,dense_layers=1"
    result = decode_blocks(model, text[:64], policy=policy, steps=2, max_blocks=2)
    # The prompt and the first block's KV, in the two layers that choose pages.
    assert result.build_bytes == 2 * 80 * 4 * model.config.head_dim * model.config.kv_heads
    total, without = result.traffic(), result.traffic(first_pass=False)
    assert total.bytes_read == total.page_bytes + total.metadata_bytes + result.build_bytes
    assert without.build_bytes == 0 < without.metadata_bytes < total.metadata_bytes


def test_what_is_recorded_of_losa_is_what_it_did(model: TinyModel, text: bytes) -> None:
    seen: list[PassRecord] = []
    result = decode_blocks(
        model, text[:128], policy="losa:budget=32,active=3", steps=4, max_blocks=1, on_pass=seen.append
    )
    assert all(one is other for one, other in zip(seen, result.passes, strict=True))
    assert all(record.seconds > 0 for record in seen)
    first, *later = seen
    assert first.reads.density == 1
    assert (np.asarray([record.active_rows for record in later]).min(axis=0) == 3).any()
    for record in later:
        assert record.reads.tokens_read == record.loaded.sum() * 16  # the prefix is whole pages of 16
    assert result.traffic(first_pass=False).density < result.traffic().density < 1


@pytest.mark.clause("POLICY-7", "DRIVER-3")
def test_within_a_block_rows_decoded_two_passes_ago_are_not_computed(model: TinyModel, text: bytes) -> None:
    options: dict[str, Any] = {"block_length": 8, "steps": 8, "max_blocks": 1}
    result = decode_blocks(model, text[:32], policy="dkv-cache", **options)
    rows = [8, 8, 7, 6, 5, 4, 3, 2, 8]  # the save pass computes all rows
    assert [record.reads.computed_rows for record in result.passes] == rows
    assert [record.active_rows.tolist() for record in result.passes] == [[count] * 3 for count in rows]
    dense = decode_blocks(model, text[:32], policy="dense", **options)
    assert result.passes[0].newly_decoded == dense.passes[0].newly_decoded


@pytest.mark.parametrize("policy", ["fast-dllm", "fast-dllm:mode=prefix"])
def test_a_block_causal_model_has_nothing_to_refresh(model: TinyModel, text: bytes, policy: str) -> None:
    one, two = (
        decode_blocks(model, text[:40], policy=name, block_length=8, steps=4, max_blocks=2)
        for name in (policy, "dense")
    )
    assert (one.generated, one.traffic().pairs) == (two.generated, two.traffic().pairs)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 17}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"threshold": "high"}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"steps": 4, "threshold": 0.5}, "steps"),
        ({"block_length": 12}, "block_length"),
        ({"max_blocks": 0}, "max_blocks"),
        ({"page_size": 0}, "page_size"),
        ({"page_size": "16"}, "page_size"),
        ({"on_pass": 3}, "on_pass"),
        ({"prefix": b"text"}, "prefix"),
    ],
)
def test_bad_options_are_refused_by_name(model: TinyModel, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        decode_blocks(model, b"some text", **{"policy": "dense", **options})
    assert caught.value.argument == argument


@pytest.mark.clause("ERROR-1")
def test_a_prefix_of_something_else_is_refused(
    model: TinyModel, make_model: Callable[..., TinyModel], text: bytes
) -> None:
    prompt = text[:40]
    wrong = [
        model.prefill(text[:39]),
        model.prefill(text[1:41]),
        model.prefill(prompt, block_length=8),
        make_model(seed=5).prefill(prompt),
        model.empty_cache(),
    ]
    for prefix in wrong:
        with pytest.raises(InvalidArgumentError, match="prefix"):
            decode_blocks(model, prompt, policy="dense", prefix=prefix)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "dkv-cache"}, "must compute all rows.*one by one"),
        ({"max_blocks": [1]}, "max_blocks"),
        ({"max_blocks": [1, 0]}, "max_blocks"),
        ({"block_length": 8}, "prefix"),
    ],
)
def test_what_cannot_be_decoded_together_is_refused(
    model: TinyModel, text: bytes, options: dict[str, Any], message: str
) -> None:
    prefix = KVCache.together([model.prefill(text[:40])] * 2)
    given = {"policy": "dense", "prefix": prefix, "max_blocks": [1, 1], **options}
    with pytest.raises(InvalidArgumentError, match=message):
        decode_together(model, [text[:40]] * 2, **given)
    assert prefix.length == 32
