"""Memory: what it is refused for, how it follows a batch, and that it copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from problems import block, ragged_context

from sparse_dlm_attn import (
    CallOrderError,
    Context,
    Decoder,
    InvalidArgumentError,
    InvalidTypeError,
    PassInfo,
    PassInputs,
    PrefixAttention,
    PrefixAttentionPolicy,
    Selection,
    StaleMemoryError,
)
from sparse_dlm_attn.memory import LayerMemory

Array = np.ndarray[Any, Any]
SNAPKV = "snapkv:capacity=24,window=8,kernel=3"
PAGE = 8


def as_is(array: Array) -> Any:
    return array


def tensors(array: Array) -> Any:
    return pytest.importorskip("torch").from_numpy(np.ascontiguousarray(array))


LIBRARIES = pytest.mark.parametrize(
    ("backend", "convert"), [("reference", as_is), ("torch", tensors)], ids=["reference", "torch"]
)


def run(
    attention: PrefixAttention,
    memory: LayerMemory | None,
    info: PassInfo,
    convert: Callable[[Array], Any],
    *,
    batch: int = 2,
    tokens: int = 64,
    page: int = PAGE,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    dtype: str = "float32",
    lengths: Any = None,
    rows: int = 4,
    seed: int = 0,
) -> LayerMemory:
    rng = np.random.default_rng(seed)
    q, k, v = (convert(rng.standard_normal((batch, count, rows, dim)).astype(dtype)) for count in (*heads, heads[1]))
    cache = rng.standard_normal((2, batch, heads[1], tokens, dim)).astype(dtype)
    lengths = None if lengths is None else convert(np.asarray(lengths, np.int32))
    context = Context.from_dense(convert(cache[0]), convert(cache[1]), page, lengths)
    return attention(q, k, v, context, memory, info)[1]


KNOWN_FROM_SHAPES: dict[str, dict[str, Any]] = {
    "more sequences": {"batch": 3},
    "fewer sequences": {"batch": 1},
    "a smaller page size": {"page": 4},
    "a larger page size": {"page": 16},
    "other query heads": {"heads": (8, 2)},
    "other KV heads": {"heads": (4, 4)},
    "other channels": {"dim": 8},
    "another dtype": {"dtype": "float64"},
    "fewer pages": {"tokens": 32},
}
KNOWN_FROM_VALUES: dict[str, dict[str, Any]] = {
    "fewer tokens in a page that was full": {"lengths": [64, 44]},
    "no tokens": {"lengths": [0, 64]},
}


@LIBRARIES
@pytest.mark.parametrize("other", [*KNOWN_FROM_SHAPES, *KNOWN_FROM_VALUES])
def test_memory_of_a_sequence_is_refused_for_another_one(
    backend: str, convert: Callable[[Array], Any], other: str
) -> None:
    attention = PrefixAttention(SNAPKV, backend, check_contents=other in KNOWN_FROM_VALUES)
    memory = run(attention, None, PassInfo(0), convert)
    memory = run(attention, memory, PassInfo(1), convert)
    changes = {**KNOWN_FROM_SHAPES, **KNOWN_FROM_VALUES}[other]
    with pytest.raises(StaleMemoryError, match=r"where another sequence begins, or call reset\(\)"):
        run(attention, memory, PassInfo(0), convert, **changes)


def test_memory_of_another_policy_layer_or_version_is_refused_in_these_words() -> None:
    attention, rows, context = PrefixAttention("dense"), block(9), ragged_context(8)
    _, memory = attention(*rows, context, None, PassInfo(0, num_layers=2))
    for driver, view, info, words in (
        (PrefixAttention("losa"), context, PassInfo(1, num_layers=2), "made by Dense.*not by Losa"),
        (attention, context, PassInfo(1, layer=1, num_layers=2), r"belongs to layer 0, info\.layer is 1"),
        (attention, replace(context, version=1), PassInfo(1, num_layers=2), "version 0 became 1"),
    ):
        with pytest.raises(StaleMemoryError, match=words):
            driver(*rows, view, memory, info)


@pytest.mark.parametrize("other", KNOWN_FROM_SHAPES)
def test_memory_of_a_block_is_refused_within_it_and_dropped_at_the_next(other: str) -> None:
    attention = PrefixAttention("losa:budget=16,active=2", check_contents=False)
    memory, changes = run(attention, None, PassInfo(0), as_is), KNOWN_FROM_SHAPES[other]
    with pytest.raises(StaleMemoryError):
        run(attention, memory, PassInfo(1), as_is, **changes)
    assert run(attention, memory, PassInfo(0), as_is, **changes).traffic.kv_heads


@LIBRARIES
def test_a_context_that_grew_continues_the_sequence(backend: str, convert: Callable[[Array], Any]) -> None:
    attention = PrefixAttention(SNAPKV, backend)
    memory = run(attention, None, PassInfo(0), convert, lengths=[40, 29])
    for tokens, lengths in ((64, [40, 29]), (64, [64, 31]), (96, [72, 90])):
        grown = {"tokens": tokens, "lengths": lengths, "rows": tokens // 16}
        memory = run(attention, memory, PassInfo(0), convert, **grown)
        kept = np.asarray(memory.selection.mask)
        assert not kept[0, :, 0, :5].all()  # the choice of the first block, not a new one
    with pytest.raises(StaleMemoryError, match="page 8 of sequence 0 held 8 tokens, now 7"):
        run(attention, memory, PassInfo(0), convert, tokens=96, lengths=[71, 90])


def test_pages_that_moved_while_their_sequence_grew_are_noticed() -> None:
    """Pages cut from the end of a sequence hold other tokens when it grows by less than a page."""
    rng, attention, memory = np.random.default_rng(0), PrefixAttention(SNAPKV), None
    q, k, v = block(0, batch=1, head_dim=16)
    for tokens, moved in ((50, False), (58, False), (61, True)):
        cache = rng.standard_normal((2, 1, 2, tokens, 16)).astype(np.float32)
        valid = np.ones((1, tokens), bool)
        context = Context.from_dense(cache[0], cache[1], PAGE, valid=valid)
        if moved:
            with pytest.raises(StaleMemoryError, match="page 0 of sequence 0 held 2 tokens, now 5"):
                attention(q, k, v, context, memory, PassInfo(0))
        else:
            memory = attention(q, k, v, context, memory, PassInfo(0))[1]


def test_a_block_may_take_the_place_of_a_suffix() -> None:
    attention, (q, k, v) = PrefixAttention(SNAPKV), block(1, tokens=4)
    first = ragged_context(2, pages=8, page_size=4)
    lengths = np.array([[4, 4, 4, 0, 4, 4, 4, 4]] * 2, np.int32)  # page 3 is the block
    segments = np.array([[0, 0, 0, 1, 2, 2, 2, 2]] * 2, np.int8)
    before = replace(first, page_lengths=lengths, page_segments=segments)
    _, memory = attention(q, k, v, before)
    after = lengths.copy()
    after[:, 3], after[:, 4] = 4, 0
    _, memory = attention(q, k, v, replace(before, page_lengths=after), memory, PassInfo(0))
    with pytest.raises(StaleMemoryError, match="page 1 of sequence 0 held 4 tokens, now 0"):
        after[:, 1] = 0
        attention(q, k, v, replace(before, page_lengths=after), memory, PassInfo(0))


def test_a_sequence_that_begins_a_block_while_others_run_has_to_continue_its_own() -> None:
    attention = PrefixAttention(SNAPKV)
    memory = run(attention, None, PassInfo(0), as_is, lengths=[40, 40])
    place = PassInfo(np.array([1, 0], np.int32))
    assert run(attention, memory, place, as_is, lengths=[40, 48]).active.all()
    with pytest.raises(StaleMemoryError, match="page 4 of sequence 1 held 8 tokens, now 0"):
        run(attention, memory, place, as_is, lengths=[40, 32])
    with pytest.raises(StaleMemoryError, match="in the middle of its block"):
        run(attention, memory, place, as_is, lengths=[48, 48])


def test_a_decoder_is_reset_between_sequences() -> None:
    decoder = Decoder(SNAPKV, layers=1)
    q, k, v = block(0)
    for tokens in (24, 12):
        cache = np.zeros((2, 2, 2, tokens, 8), np.float32)
        decoder.start_block([Context.from_dense(cache[0], cache[1], 4)])
        if tokens == 12:
            with pytest.raises(StaleMemoryError, match=r"reset\(\) of a Decoder"):
                decoder.next_pass()(0, q, k, v)
            decoder.reset()
            decoder.start_block([Context.from_dense(cache[0], cache[1], 4)])
        decoder.next_pass()(0, q, k, v)
        decoder.finish_block()


POLICIES = ("losa:budget=8,active=2", "flashblock", "sparsed:warmup=1,ratio=0.3", SNAPKV)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("order", [[1, 0], [1], [0, 0, 1]], ids=str)
def test_a_decoder_follows_sequences_that_change_places(policy: str, order: list[int]) -> None:
    """Between passes of a block; the next block, of a cache that was copied, goes on from there."""
    context, everyone = ragged_context(3, pages=10), [0, 1]
    moved, plain = (Decoder(policy, layers=1) for _ in range(2))

    def step(decoder: Decoder, index: int, rows: list[int]) -> Any:
        decoded = (np.arange(5) < index)[None].repeat(len(rows), axis=0)
        return decoder.next_pass(decoded)(0, *(part[rows] for part in block(10 + index)))

    for decoder in (moved, plain):
        decoder.start_block([context])
        for index in range(2):
            step(decoder, index, everyone)
    moved.reorder(order)
    for first in (2, 0):
        for index in range(first, 4):
            out, wanted = step(moved, index, order), step(plain, index, everyone)
            np.testing.assert_allclose(out, wanted[order], atol=1e-6)
            memories = moved.memories[0], plain.memories[0]
            np.testing.assert_array_equal(memories[0].active, memories[1].active[order])
        for decoder, rows in ((moved, order), (plain, everyone)):
            decoder.finish_block()
            decoder.start_block([context.reorder(rows)])


def test_the_next_context_of_a_reordered_memory_may_lie_elsewhere() -> None:
    attention = PrefixAttention("losa:budget=16,active=2")
    memory = run(attention, None, PassInfo(0), as_is, lengths=[40, 29])
    moved = memory.reorder(np.array([1, 0, 1]))
    assert moved.page_lengths.shape == (3, 8) and memory.page_lengths.shape == (2, 8)
    run(attention, moved, PassInfo(1), as_is, batch=3, lengths=[29, 40, 29])
    with pytest.raises(StaleMemoryError, match="page_lengths differs"):
        run(attention, moved, PassInfo(1), as_is, batch=3, lengths=[40, 29, 29])


def test_numbers_of_sequences_are_checked_and_nothing_changes() -> None:
    decoder, (q, k, v) = Decoder("losa:budget=8,active=2", layers=1), block(0)
    decoder.start_block([ragged_context(0)])
    step = decoder.next_pass(np.zeros((2, 5), bool))
    with pytest.raises(CallOrderError, match=r"reorder\(\) must be called between passes; found layers"):
        decoder.reorder([1, 0])
    step(0, q, k, v)
    kept = decoder.memories
    for wrong, error in (
        ([0, 2], InvalidArgumentError),
        ([-1], InvalidArgumentError),
        (np.array([[0]]), InvalidArgumentError),
        ([[0]], InvalidTypeError),
        ([0.0], InvalidTypeError),
        ([True], InvalidTypeError),
        ("01", InvalidTypeError),
        (1, InvalidTypeError),
        (None, InvalidTypeError),
        (np.array([0.5]), InvalidTypeError),
    ):
        with pytest.raises(error, match="indices must"):
            decoder.reorder(wrong)
    assert decoder.memories == kept
    decoder.reorder([])
    assert decoder.memories[0] is not None and decoder.memories[0].active.shape == (0, 5)


@dataclass(frozen=True, eq=False)
class Odd:
    held: Any


@dataclass(frozen=True)
class Remembers(PrefixAttentionPolicy[Any]):
    """Remembers what it is told to."""

    name: ClassVar[str] = "remembers"
    value: Any = None

    def select_pages(self, inputs: PassInputs[Any], active: Array) -> Selection:
        return Selection.all_pages(inputs.context, inputs.tokens)

    def remember(self, inputs: PassInputs[Any], active: Array, selection: Selection) -> Any:
        return self.value


def test_every_array_of_a_policy_s_value_is_taken_along_its_first_axis() -> None:
    rows = np.array([[1, 2], [3, 4]])
    value = Odd((rows, Odd(rows[0]), 3, "name", None, np.float32(2.5)))
    memory = run(PrefixAttention(Remembers(value)), None, PassInfo(0), as_is).reorder([1, 1])
    taken = memory.policy_memory.held
    assert taken[0].tolist() == [[3, 4], [3, 4]] and taken[1].held.tolist() == [2, 2]
    assert taken[2:] == (3, "name", None, 2.5)
    unknown = run(PrefixAttention(Remembers({"rows": rows})), None, PassInfo(0), as_is)
    with pytest.raises(InvalidTypeError, match=r"got dict\. Give the policy a reorder\(\) of its own"):
        unknown.reorder([0])


@LIBRARIES
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda memory: pickle.loads(pickle.dumps(memory))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_of_the_memory_serves_like_itself(
    backend: str, convert: Callable[[Array], Any], policy: str, copied: Callable[[Any], Any]
) -> None:
    attention, flags = PrefixAttention(policy, backend), convert(np.zeros((2, 4), bool))
    memory = run(attention, None, PassInfo(0, newly_decoded=flags), convert)
    assert float(memory.traffic.density[0]) == 1 or policy.startswith("quest")
    twin, place = copied(memory), PassInfo(1, newly_decoded=flags)
    one, other = (run(PrefixAttention(policy, backend), each, place, convert) for each in (memory, twin))
    np.testing.assert_array_equal(np.asarray(one.state.out), np.asarray(other.state.out))
    np.testing.assert_array_equal(np.asarray(one.selection.mask), np.asarray(other.selection.mask))
