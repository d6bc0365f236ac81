from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from sparse_dlm_attn import (
    Backend,
    InvalidArgumentError,
    LayerMemory,
    PassInfo,
    PassInputs,
    PrefixAttentionPolicy,
    Selection,
    SparseAttentionError,
    UnknownNameError,
)
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn_tiny.config import MASK_ID, TinyConfig
from sparse_dlm_attn_tiny.decoding import decode_blocks, decode_full_sequence
from sparse_dlm_attn_tiny.model import BlockPass, TinyModel
from sparse_dlm_attn_tiny.records import PassRecord

POLICIES = [
    "dense", "sliding-window:window=32", "streaming-llm:sinks=16,window=32", "quest:budget=32",
    "losa:budget=32", "flashblock", "mage:budget=32", "sparsed",
]
Wanted = Callable[[int], tuple[np.ndarray, np.ndarray]]


class Scripted(TinyModel):
    """The small model with logits of our choice: a byte and a confidence for every position."""

    def __init__(self, base: TinyModel, wanted: Wanted) -> None:
        self.__dict__.update(base.__dict__)
        self.wanted = wanted
        self.infos: list[PassInfo] = []
        self.inputs: list[list[int]] = []

    def forward_block(
        self, tokens: Any, position: int, contexts: Any, attention: Any, info: PassInfo,
        memories: Any = None, **skips: Any,
    ) -> BlockPass:
        result = super().forward_block(tokens, position, contexts, attention, info, memories, **skips)
        return replace(result, logits=self.scripted(tokens[0].tolist(), position, info)[None])

    def forward_sequence(
        self, tokens: Sequence[int], rows: Any, cache: Any, window_end: int, attention: Any, info: PassInfo,
        memories: Any = None,
    ) -> tuple[Any, tuple[LayerMemory, ...]]:
        _, kept = super().forward_sequence(tokens, rows, cache, window_end, attention, info, memories)
        return self.scripted(tokens, 0, info), kept

    def scripted(self, tokens: Sequence[int], position: int, info: PassInfo) -> Any:
        self.infos.append(info)
        self.inputs.append(list(tokens))
        best, confidence = (np.asarray(part)[: len(tokens)] for part in self.wanted(position))
        rest = (1 - confidence) / 255
        logits = np.log(np.broadcast_to(rest[:, None], (len(tokens), 256))).copy()
        logits[np.arange(len(tokens)), best] = np.log(confidence)
        return logits.astype(np.float32)


def always(best: Sequence[int], confidence: Sequence[float]) -> Wanted:
    return lambda position: (np.asarray(best), np.asarray(confidence))


def decoded_order(model: Scripted, prompt: bytes = b"x" * 8, **options: Any) -> list[tuple[int, ...]]:
    """Positions decoded after each denoising pass of the first block."""
    result = decode_blocks(model, prompt, policy="dense", block_length=8, max_blocks=1, **options)
    return [record.newly_decoded for record in result.passes if not record.is_save]


RISING = np.linspace(0.1, 0.8, 8)
LETTERS = list(b"abcdefgh")


@pytest.mark.parametrize(
    ("steps", "counts"), [(3, [3, 3, 2]), (8, [1] * 8), (1, [8]), (5, [2, 2, 2, 1, 1])]
)
def test_the_fixed_schedule_gives_the_rest_to_the_first_passes(
    model: TinyModel, steps: int, counts: list[int]
) -> None:
    order = decoded_order(Scripted(model, always(LETTERS, RISING)), steps=steps)
    assert [len(positions) for positions in order] == counts


def test_sixteen_tokens_in_sixteen_steps_are_one_a_pass(model: TinyModel, text: bytes) -> None:
    result = decode_blocks(model, text[:32], policy="dense", steps=16, max_blocks=1)
    assert [len(record.newly_decoded) for record in result.passes] == [1] * 16 + [0]


def test_the_surest_tokens_are_decoded_first(model: TinyModel) -> None:
    order = decoded_order(Scripted(model, always(LETTERS, RISING)), steps=4)
    assert order == [(6, 7), (4, 5), (2, 3), (0, 1)]


def test_equal_confidences_decode_the_lowest_position_first(model: TinyModel) -> None:
    order = decoded_order(Scripted(model, always(LETTERS, np.full(8, 0.5))), steps=4)
    assert order == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_a_threshold_decodes_what_is_strictly_above_it_and_at_least_the_best(model: TinyModel) -> None:
    confidence = np.asarray([0.3, 0.95, 0.6, 0.9, 0.2, 0.7, 0.1, 0.15])
    script = Scripted(model, always(LETTERS, confidence))
    order = decoded_order(script, threshold=0.65)
    assert order == [(1, 3, 5), (2,), (0,), (4,), (7,), (6,)]
    level = Scripted(model, lambda position: (np.asarray(LETTERS), np.full(8, 1 / 256)))
    assert decoded_order(level, threshold=1 / 256) == [(position,) for position in range(8)]
    assert decoded_order(level, threshold=0.0) == [tuple(range(8))]
    assert decoded_order(level, threshold=1.0) == [(position,) for position in range(8)]


def test_prompt_bytes_in_the_first_block_stay_and_are_fed_as_decoded(model: TinyModel) -> None:
    prompt = b"x" * 8 + b"\x00yz"
    script = Scripted(model, always(LETTERS, RISING))
    result = decode_blocks(script, prompt, policy="dense", block_length=8, steps=2, max_blocks=2)
    assert script.inputs[0] == [0, *b"yz", *[MASK_ID] * 5]
    assert [len(record.newly_decoded) for record in result.passes[:3]] == [4, 1, 0]
    assert result.passes[2].tokens == (0, *b"yzdefgh")
    assert result.generated == b"defgh" + b"abcdefgh"
    assert not result.stopped  # a stop byte in the prompt stops nothing
    assert result.prefilled_tokens == 8


def test_a_first_block_never_overwrites_what_is_decoded_though_the_schedule_wants_more(
    model: TinyModel,
) -> None:
    prompt = b"x" * 8 + b"uvwxyz"  # two masks, four tokens a pass
    script = Scripted(model, always(LETTERS, RISING[::-1]))
    result = decode_blocks(script, prompt, policy="dense", block_length=8, steps=2, max_blocks=1)
    assert [record.newly_decoded for record in result.passes] == [(6, 7), ()]
    assert result.passes[-1].tokens == tuple(b"uvwxyzgh")


def test_decoding_ends_with_the_block_that_holds_a_stop_byte(model: TinyModel) -> None:
    def second_block_stops(position: int) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(LETTERS if position == 8 else list(b"no\x00\x00\x00\x00\x00z")), RISING

    script = Scripted(model, second_block_stops)
    result = decode_blocks(script, b"x" * 8, policy="dense", block_length=8, max_blocks=5)
    assert result.stopped
    assert result.output == b"abcdefghno"
    assert result.generated == b"abcdefghno\x00\x00\x00\x00\x00z"
    assert result.blocks == 2


def test_without_a_stop_byte_the_number_of_blocks_ends_it(model: TinyModel) -> None:
    script = Scripted(model, always(LETTERS, RISING))
    result = decode_blocks(script, b"x" * 8, policy="dense", block_length=8, max_blocks=3)
    assert (result.output, result.stopped, result.blocks) == (b"abcdefgh" * 3, False, 3)


def test_every_pass_is_told_where_it_stands(model: TinyModel) -> None:
    script = Scripted(model, always(LETTERS, RISING))
    decode_blocks(script, b"x" * 8 + b"pq", policy="dense", block_length=8, steps=4, max_blocks=2)
    assert [info.index for info in script.infos] == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert [info.is_save for info in script.infos] == [False] * 3 + [True] + [False] * 4 + [True]
    assert [info.total_passes for info in script.infos] == [3] * 4 + [4] * 5
    before = None
    for info, tokens in zip(script.infos, script.inputs, strict=True):
        decoded = np.asarray([token != MASK_ID for token in tokens])
        np.testing.assert_array_equal(to_numpy(info.decoded)[0], decoded)
        since = np.zeros(8, dtype=bool) if info.index == 0 else decoded & ~before
        np.testing.assert_array_equal(to_numpy(info.newly_decoded)[0], since)
        before = decoded
    by_threshold = Scripted(model, always(LETTERS, RISING))
    decode_blocks(by_threshold, b"x", policy="dense", block_length=8, threshold=0.5, max_blocks=1)
    assert {info.total_passes for info in by_threshold.infos} == {None}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prompt_tokens", [3, 16, 17, 81])
def test_every_policy_decodes_after_prompts_of_any_length(
    model: TinyModel, text: bytes, policy: str, prompt_tokens: int
) -> None:
    result = decode_blocks(
        model, text[:prompt_tokens].replace(b"\x00", b"-"), policy=policy, steps=3, max_blocks=2,
        page_size=10,
    )
    assert result.generated
    assert len(result.generated) == 16 * result.blocks - prompt_tokens % 16
    for record in result.passes:
        assert (record.tokens_read <= record.context_tokens).all()
        assert record.density <= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_shared_prefix_changes_no_result_and_is_not_changed(
    model: TinyModel, text: bytes, policy: str
) -> None:
    prompt = text[:100]
    prefix = model.prefill(prompt)
    alone = decode_blocks(model, prompt, policy=policy, max_blocks=3)
    for _ in range(2):
        shared = decode_blocks(model, prompt, policy=policy, max_blocks=3, prefix=prefix)
        assert shared.generated == alone.generated
        assert shared.traffic() == alone.traffic()
    assert (prefix.length, prefix.version) == (96, 1)


@pytest.mark.clause("CONTEXT-5")
@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_dense_decoding_does_not_depend_on_the_page_size(
    model: TinyModel, text: bytes, page_size: int
) -> None:
    expected = decode_blocks(model, text[:64], policy="dense", max_blocks=2)
    prefix = model.prefill(text[:64])
    result = decode_blocks(
        model, text[:64], policy="dense", max_blocks=2, page_size=page_size, prefix=prefix
    )
    assert result.generated == expected.generated
    assert result.page_size == page_size


@pytest.mark.clause("POLICY-1")
@pytest.mark.parametrize("policy", ["dense", "losa:budget=32"])
def test_other_array_libraries_decode_the_same(
    small_config: TinyConfig, small_weights: dict[str, np.ndarray], model: TinyModel,
    library_backend: Backend, text: bytes, policy: str,
) -> None:
    other = TinyModel(small_config, small_weights, library_backend)
    options: dict[str, Any] = {"policy": policy, "steps": 4, "max_blocks": 2}
    ours, theirs = (decode_blocks(each, text[:70], **options) for each in (model, other))
    assert theirs.generated == ours.generated
    assert theirs.traffic() == ours.traffic()


@pytest.mark.clause("DENSITY-1", "DENSITY-2")
def test_dense_decoding_reads_everything_in_every_pass(model: TinyModel, text: bytes) -> None:
    result = decode_blocks(model, text[:64], policy="dense", steps=2, max_blocks=2)
    config = model.config
    token_bytes = 2 * 4 * config.head_dim * config.kv_heads * config.layers
    assert [record.context_tokens.tolist() for record in result.passes] == [
        [64 * config.kv_heads] * config.layers
    ] * 3 + [[80 * config.kv_heads] * config.layers] * 3
    total = result.traffic()
    assert total.page_bytes == total.dense_bytes == token_bytes * (3 * 64 + 3 * 80)
    assert (total.metadata_bytes, total.build_bytes) == (0, 0)
    without = result.traffic(first_pass=False)
    assert (without.passes, without.page_bytes) == (4, token_bytes * (2 * 64 + 2 * 80))
    assert (total.density, total.byte_share, without.byte_share) == (1, 1, 1)
    assert all(record.loaded.all() and (record.active_rows == 16).all() for record in result.passes)
    assert result.passes[-1].loaded.shape == (config.layers, config.kv_heads, 5)


@pytest.mark.clause("DENSITY-2")
def test_building_bounds_is_charged_once_to_policies_that_read_them(model: TinyModel, text: bytes) -> None:
    config = model.config
    layer_bytes = 4 * config.head_dim * config.kv_heads
    result = decode_blocks(
        model, text[:64], policy="quest:budget=16,dense_layers=1", steps=2, max_blocks=2,
        prefix=model.prefill(text[:64]),
    )
    # The prompt and the first block's KV, in the two layers that choose pages.
    assert result.build_bytes == 2 * 80 * layer_bytes
    total, without = result.traffic(), result.traffic(first_pass=False)
    assert total.bytes_read == total.page_bytes + total.metadata_bytes + result.build_bytes
    assert without.build_bytes == 0
    assert 0 < without.metadata_bytes < total.metadata_bytes


def test_what_is_recorded_of_losa_is_what_it_did(model: TinyModel, text: bytes) -> None:
    result = decode_blocks(model, text[:128], policy="losa:budget=32,active=3", steps=4, max_blocks=1)
    first, *later = result.passes
    assert first.density == 1
    sparse_layers = np.asarray([record.active_rows for record in later]).min(axis=0) == 3
    assert sparse_layers.any()
    for record in later:
        read = (record.loaded * 16).sum(axis=(1, 2))  # the prefix is whole pages of 16
        np.testing.assert_array_equal(record.tokens_read, read)
    assert result.traffic(first_pass=False).density < result.traffic().density < 1


def test_the_callback_sees_every_record_as_it_comes(model: TinyModel, text: bytes) -> None:
    seen: list[PassRecord] = []
    result = decode_blocks(model, text[:20], policy="dense", max_blocks=2, on_pass=seen.append)
    assert all(one is other for one, other in zip(seen, result.passes, strict=True))
    assert [record.index for record in seen][:3] == [0, 1, 2]
    assert all(record.seconds > 0 for record in seen)


@dataclass(frozen=True)
class Counting(PrefixAttentionPolicy[int]):
    """Remembers for how many passes it has been asked."""

    name: ClassVar[str] = "counting"
    memory_scope: ClassVar[Literal["block", "sequence"]] = "sequence"

    def select_pages(self, inputs: PassInputs[int], active: Any) -> Selection:
        return Selection.all_pages(inputs.context, inputs.tokens)

    def remember(self, inputs: PassInputs[int], active: Any, selection: Selection) -> int:
        return (inputs.memory or 0) + 1


@dataclass(frozen=True)
class CountingPerBlock(Counting):
    memory_scope: ClassVar[Literal["block", "sequence"]] = "block"


@pytest.mark.clause("MEMORY-1")
@pytest.mark.parametrize(("kind", "counts"), [(Counting, [1, 2, 3, 4, 5, 6]),
                                              (CountingPerBlock, [1, 2, 3, 1, 2, 3])])
def test_memory_lasts_as_long_as_the_policy_says(
    model: TinyModel, kind: type[Counting], counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered = []
    original = PassRecord.of.__func__  # type: ignore[attr-defined]

    def spy(cls: type[PassRecord], memories: Any, **options: Any) -> list[PassRecord]:
        remembered.append(memories[0].policy_memory)
        return original(cls, memories, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(PassRecord, "of", classmethod(spy))
    script = Scripted(model, always(LETTERS, RISING))
    decode_blocks(script, b"x" * 8, policy=kind(), block_length=8, steps=2, max_blocks=2)
    assert remembered == counts


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"steps": 0}, "steps"), ({"steps": 17}, "steps"), ({"steps": 2.0}, "steps"),
        ({"threshold": -0.1}, "threshold"), ({"threshold": 1.1}, "threshold"),
        ({"threshold": "high"}, "threshold"), ({"threshold": float("nan")}, "threshold"),
        ({"steps": 4, "threshold": 0.5}, "steps/threshold"),
        ({"block_length": 12}, "block_length"), ({"max_blocks": 0}, "max_blocks"),
        ({"page_size": 0}, "page_size"), ({"page_size": "16"}, "page_size"),
        ({"on_pass": 3}, "on_pass"), ({"prefix": b"text"}, "prefix"),
    ],
)
def test_bad_options_are_refused_by_name(model: TinyModel, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        decode_blocks(model, b"some text", **{"policy": "dense", **options})
    assert caught.value.argument == argument


@pytest.mark.clause("ERROR-1", "ERROR-2")
def test_an_unknown_policy_is_refused_before_anything_is_computed(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyModel, "prefill", None)
    with pytest.raises(UnknownNameError, match="losa"):
        decode_blocks(model, b"some text", policy="lossa")


@pytest.mark.clause("ERROR-1")
def test_a_prefix_of_something_else_is_refused(
    model: TinyModel, small_config: TinyConfig, make_weights: Callable[..., Any], text: bytes
) -> None:
    prompt = text[:40]
    other_model = TinyModel(small_config, make_weights(small_config, seed=5))
    wrong = [
        model.prefill(text[:39]), model.prefill(text[1:41]), model.prefill(prompt, block_length=8),
        other_model.prefill(prompt), model.empty_cache(),
    ]
    for prefix in wrong:
        with pytest.raises(InvalidArgumentError, match="prefix"):
            decode_blocks(model, prompt, policy="dense", prefix=prefix)


def test_the_full_sequence_is_filled_in_by_confidence(model: TinyModel, text: bytes) -> None:
    prompt = text[:21]
    result = decode_full_sequence(model, prompt, new_tokens=12, steps=5)
    assert [len(record.newly_decoded) for record in result.passes] == [3, 3, 2, 2, 2]
    assert sorted(p for record in result.passes for p in record.newly_decoded) == list(range(12))
    assert len(result.generated) == 12
    assert MASK_ID not in result.passes[-1].tokens
    total = result.traffic()
    layers, heads = model.config.layers, model.config.kv_heads
    assert total.context_tokens == 5 * layers * heads * (21 + 12)  # the sequence is its own context
    assert (total.density, total.pair_share, total.row_share, total.metadata_bytes) == (1, 1, 1, 0)


def test_full_sequence_passes_see_all_tokens_at_once(model: TinyModel) -> None:
    script = Scripted(model, always([7] * 40, np.linspace(0.1, 0.9, 40)))
    result = decode_full_sequence(script, b"p" * 24, new_tokens=16, steps=4)
    assert script.inputs[0] == [*b"p" * 24, *[MASK_ID] * 16]
    assert result.passes[0].newly_decoded == (12, 13, 14, 15)
    assert script.inputs[-1].count(MASK_ID) == 4


def test_semi_autoregressive_blocks_are_filled_from_the_left_and_stop(model: TinyModel) -> None:
    answer = [1] * 8 + [ord("a")] * 8 + [ord("b"), 0, *[ord("c")] * 22]
    script = Scripted(model, always(answer, np.linspace(0.1, 0.9, 40)))
    result = decode_full_sequence(script, b"p" * 8, new_tokens=32, steps=2, block_length=8)
    assert [record.block for record in result.passes] == [0, 0, 1, 1]
    assert result.passes[0].newly_decoded == (4, 5, 6, 7)
    assert script.inputs[2][16:] == [MASK_ID] * 24
    assert (result.output, result.stopped) == (b"a" * 8 + b"b", True)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (b"", {}), (bytes(600), {}), (bytes(500), {"new_tokens": 13}), (b"x", {"new_tokens": 0}),
        (b"x", {"steps": 17}), (b"x", {"steps": 2, "threshold": 0.5}), (b"x", {"block_length": 5}),
        (b"x", {"block_length": 0}), (b"x", {"on_pass": 1}), ("x", {}),
    ],
)
def test_full_sequence_decoding_refuses_bad_input(
    model: TinyModel, prompt: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(SparseAttentionError):
        decode_full_sequence(model, prompt, **options)
