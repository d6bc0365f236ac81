"""The decoder of users who own their loop: the same passes as the driver, and clear life-times."""

from __future__ import annotations

import gc
import weakref
from typing import Any

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
    PrefixAttention,
    StaleMemoryError,
    get_backend,
)
from sparse_dlm_attn.arrays import to_numpy

LAYERS = 2


def backend_named(name: str) -> Any:
    if name == "torch":
        pytest.importorskip("torch")
    return get_backend(name)


def contexts(backend: Any, block: int = 0) -> list[Context]:
    """What each layer reads: the last page of the first block's grows after it."""
    made = []
    for layer in range(LAYERS):
        host = ragged_context(layer)
        host.page_lengths[:, -1] += block
        made.append(
            Context(
                *(backend.asarray(array) for array in (host.k_pages, host.v_pages, host.page_table, host.page_lengths)),
                version=block,
            )
        )
    return made


def queries(backend: Any, seed: int) -> tuple[Any, ...]:
    return tuple(backend.asarray(array) for array in block(seed))


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("policy", ["dense", "losa:budget=8,active=2", "flashblock", "snapkv:capacity=16,window=4"])
def test_its_passes_are_those_of_the_driver(name: str, policy: str) -> None:
    backend = backend_named(name)
    decoder, attention = Decoder(policy, backend, layers=LAYERS), PrefixAttention(policy, backend)
    memories: list[Any] = [None] * LAYERS
    for number in range(2):
        views = contexts(backend, number)
        decoder.start_block(views, total_passes=3)
        decoded = np.zeros((2, 5), dtype=bool)
        newly = decoded.copy()
        for index in range(4):
            flags = [backend.asarray(array) for array in (decoded, newly)]
            step = decoder.next_pass(flags[0], is_save=index == 3)
            for layer in range(LAYERS):
                q, k, v = queries(backend, 100 * number + 10 * index + layer)
                info = PassInfo(index, index == 3, *flags, layer=layer, num_layers=LAYERS, total_passes=3)
                expected, memories[layer] = attention(q, k, v, views[layer], memories[layer], info)
                out = step(layer, q, k, v)
                assert np.array_equal(to_numpy(out), to_numpy(expected))
            assert step.missing == ()
            read = [float(traffic.density[1]) for traffic in step.traffic]
            assert read == [float(memory.traffic.density[1]) for memory in memories]
            newly = np.zeros_like(decoded)
            newly[:, index] = True
            decoded = decoded | newly  # rebound: what the decoder keeps must not be the caller's array
        decoder.finish_block()


def test_what_the_caller_writes_into_its_mask_does_not_change_what_was_newly_decoded() -> None:
    decoder = Decoder("flashblock", layers=1)
    decoder.start_block([ragged_context(0)])
    decoded = np.zeros((2, 5), dtype=bool)
    decoder.next_pass(decoded)(0, *block(0))
    decoded[0, 3] = True
    step = decoder.next_pass(decoded)
    assert np.argwhere(step.info.newly_decoded).tolist() == [[0, 3]]


@pytest.mark.parametrize("policy", ["losa:budget=8,active=2", "quest:budget=8", "snapkv:capacity=16,window=4"])
def test_a_finished_block_lets_go_of_states_contexts_and_metadata(policy: str) -> None:
    decoder = Decoder(policy, layers=1)
    context = ragged_context(3)
    decoder.start_block([context])
    q, k, v = block(0)
    for _ in range(2):
        decoder.next_pass()(0, q, k, v)
    memory = decoder.memories[0]
    assert memory is not None
    refs = [weakref.ref(memory.state.out), weakref.ref(context.k_pages), weakref.ref(context)]
    if memory.bounds is not None:
        refs.append(weakref.ref(memory.bounds.lower))
    del memory, context
    gc.collect()
    assert all(ref() is not None for ref in refs)
    decoder.finish_block()
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
    kept = decoder.memories[0]
    assert (kept is not None) == policy.startswith("snapkv")
    decoder.reset()
    assert decoder.memories == (None,)


def test_a_context_may_come_with_each_call() -> None:
    q, k, v = block(0)
    decoder = Decoder("dense", layers=1)
    decoder.start_block()
    out = decoder.next_pass()(0, q, k, v, ragged_context(1), scale=0.5)
    expected, _ = PrefixAttention("dense")(q, k, v, ragged_context(1), scale=0.5)
    assert np.array_equal(out, expected)
    step = decoder.next_pass()
    with pytest.raises(InvalidArgumentError, match="context must be given here or to start_block"):
        step(0, q, k, v)
    out = step(0, q, k, v, ragged_context(1), scale=0.5)  # the refused call changed nothing
    assert np.array_equal(out, expected)


def test_rows_that_the_model_computes_are_asked_of_the_policy() -> None:
    decoder = Decoder("fast-dllm", layers=1)
    decoder.start_block()
    window = np.zeros((1, 6), dtype=bool)
    window[:, 2:4] = True
    q = np.zeros((1, 1, 6, 4), dtype=np.float32)
    whole = Context.from_dense(q, q, 2)
    for index, rows in enumerate(([0, 1, 2, 3, 4, 5], [2, 3])):
        step = decoder.next_pass(window=window, window_index=index)
        assert np.flatnonzero(step.computed_tokens(1, 6, q)).tolist() == rows
        step(0, q, None, None, whole)


@pytest.mark.parametrize(("order", "taken"), [([2, 5], 8), ([5, 2], 0)])
def test_what_is_decoded_next_and_in_which_order_reaches_the_policy(order: list[int], taken: int) -> None:
    """Row 3 lies between rows 2 and 5: who comes first takes it, and the other looks behind itself."""
    decoder = Decoder("dkv-cache:mode=greedy,neighbours=1", layers=1)
    decoder.start_block()
    q = np.zeros((1, 1, 9, 4), dtype=np.float32)
    decoded, planned = ~np.isin(range(9), [0, 2, 3, 5, 8])[None], np.isin(range(9), order)[None]
    for rows in ([*range(9)], sorted({2, 3, 5, taken})):
        step = decoder.next_pass(decoded, planned=planned, planned_order=np.array([order]))
        assert np.flatnonzero(step.computed_tokens(1, 9, q)).tolist() == rows
        step(0, q, None, None, Context.from_dense(q, q, 3))


def test_calls_out_of_order_say_what_to_call() -> None:
    q, k, v = block(0)
    decoder = Decoder("dense", layers=2)
    with pytest.raises(CallOrderError, match=r"within a block; found no block\. Call start_block"):
        decoder.next_pass()
    decoder.start_block([ragged_context(0)] * 2)
    with pytest.raises(CallOrderError, match=r"start_block\(\) must not .* Call finish_block\(\) first"):
        decoder.start_block([ragged_context(0)] * 2)
    first = decoder.next_pass()
    first(0, q, k, v)
    with pytest.raises(CallOrderError, match="layer 0 again"):
        first(0, q, k, v)
    with pytest.raises(CallOrderError, match=r"layers \[1\] missing"):
        decoder.next_pass()
    with pytest.raises(CallOrderError, match=r"layers \[1\] missing"):
        _ = first.traffic
    first(1, q, k, v)
    second = decoder.next_pass()
    with pytest.raises(CallOrderError, match="must be the current one"):
        first(1, q, k, v)
    with pytest.raises(InvalidArgumentError, match="layer must be less than the model's 2 layers; got 2"):
        second(2, q, k, v)
    decoder.finish_block()
    with pytest.raises(CallOrderError, match="must be the current one"):
        second(0, q, k, v)
    decoder.finish_block()  # nothing happens
    assert not decoder.running and decoder.blocks == 1


@pytest.mark.parametrize(
    ("contexts", "options", "error", "words"),
    [
        ([ragged_context(0)], {}, InvalidArgumentError, "one for each of 2 layers; got 1"),
        ([1, 2], {}, InvalidTypeError, "contexts must hold Contexts; got int"),
        (ragged_context(0), {}, InvalidTypeError, "contexts must be a list of Contexts.*got Context"),
        ([ragged_context(0)] * 2, {"total_passes": 0}, InvalidArgumentError, "total_passes must be at least 1"),
    ],
    ids=["one of two", "numbers", "no list", "no passes"],
)
def test_a_block_that_is_refused_does_not_start(contexts: Any, options: Any, error: Any, words: str) -> None:
    decoder = Decoder("dense", layers=2)
    with pytest.raises(error, match=words):
        decoder.start_block(contexts, **options)
    assert not decoder.running
    decoder.start_block(ragged_context(0) for _ in range(2))  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="decoded must be an array"):
        decoder.next_pass(decoded=[True])
    assert decoder.next_pass().info.index == 0


def test_a_decoder_needs_layers() -> None:
    with pytest.raises(InvalidArgumentError, match="layers must be at least 1"):
        Decoder("dense", layers=0)


def test_an_error_of_the_caller_s_own_generator_of_contexts_is_kept() -> None:
    def broken() -> Any:
        yield ragged_context(0)
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        Decoder("dense", layers=2).start_block(broken())


def test_decoded_rows_of_another_shape_or_library_are_refused_and_change_nothing() -> None:
    torch = pytest.importorskip("torch")
    decoder, (q, k, v) = Decoder("dense", layers=1), block(0)
    decoder.start_block([ragged_context(0)])
    decoded = np.zeros((q.shape[0], q.shape[2]), dtype=bool)
    decoder.next_pass(decoded)(0, q, k, v)
    with pytest.raises(InvalidArgumentError, match=r"decoded must have shape .*pass before.*finish_block"):
        decoder.next_pass(decoded[:, :-1])
    with pytest.raises(InvalidArgumentError, match=r"decoded must be a ndarray on device cpu.*got a Tensor"):
        decoder.next_pass(torch.from_numpy(decoded))
    assert decoder.next_pass(decoded).info.index == 1


def test_a_block_of_other_rows_is_refused_in_the_terms_of_a_decoder() -> None:
    decoder, (q, k, v) = Decoder("dense", layers=1), block(0)
    decoder.start_block([ragged_context(0)])
    decoder.next_pass()(0, q, k, v)
    with pytest.raises(StaleMemoryError, match=r"finish_block\(\) of a Decoder"):
        decoder.next_pass()(0, q[:, :, :-1], k[:, :, :-1], v[:, :, :-1])
