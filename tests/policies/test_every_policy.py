"""Laws that hold for every policy, whatever its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
from policy_cases import EVERY_POLICY, AnyArrayBackend, Array, Block, denoise, make_block, rows_read

from sparse_dlm_attn import Context, PassInfo, PrefixAttention, StaleMemoryError, get_policy, list_policies
from sparse_dlm_attn.memory import LayerMemory

every_policy = pytest.mark.parametrize("policy", EVERY_POLICY)


def decisions(block: Block, memory: LayerMemory) -> tuple[Array, Array]:
    _, _, q_heads, tokens, _ = block.q.shape
    return np.asarray(memory.active), rows_read(memory, q_heads, tokens)


def test_the_cases_cover_every_registered_policy_of_this_project() -> None:
    plugins = list_policies().items()
    ours = {name for name, plugin in plugins if plugin.target.startswith("sparse_dlm_attn.")}
    assert ours == {case.partition(":")[0] for case in EVERY_POLICY}


@pytest.mark.parametrize("name", sorted({case.partition(":")[0] for case in EVERY_POLICY}))
def test_a_policy_is_registered_under_its_own_name_and_explains_every_parameter(name: str) -> None:
    policy = get_policy(name)
    assert policy.name == name
    for parameter in fields(policy):  # type: ignore[arg-type]
        assert len(parameter.metadata["help"]) > 20, parameter.name


def one_sequence(block: Block, sequence: int) -> Block:
    rows = slice(sequence, sequence + 1)
    c = block.context
    context = replace(c, page_table=c.page_table[rows], page_lengths=c.page_lengths[rows],
                      page_segments=c.page_segments[rows])
    return replace(block, q=block.q[:, rows], k=block.k[rows], v=block.v[rows], context=context,
                   newly=block.newly[:, rows])


@every_policy
@pytest.mark.clause("POLICY-2")
def test_a_sequence_of_a_batch_gets_what_it_gets_alone(policy: str) -> None:
    block = make_block(1, batch=3)
    together = list(denoise(policy, block))
    for sequence in range(3):
        alone = denoise(policy, one_sequence(block, sequence))
        for (out, memory), (single_out, single) in zip(together, alone, strict=True):
            active, read = decisions(block, memory)
            single_active, single_read = decisions(one_sequence(block, sequence), single)
            np.testing.assert_array_equal(active[sequence], single_active[0])
            np.testing.assert_array_equal(read[sequence], single_read[0])
            np.testing.assert_allclose(out[sequence], single_out[0], rtol=0, atol=2e-6)


LENGTH_OF_BLOCKS = (3, 4)  # passes; so the two sequences soon stand at different ones


def grown(context: Context, blocks_done: list[int]) -> Context:
    """Fill one more page of a sequence for each block it has finished; add a column for the last."""
    lengths = np.concatenate([context.page_lengths, np.zeros((2, 1), np.int32)], axis=1)
    table = np.concatenate([context.page_table, np.zeros((2, 1), np.int32)], axis=1)
    labels = np.concatenate([context.page_segments, np.full((2, 1), 2, np.int8)], axis=1)
    for sequence, done in enumerate(blocks_done):
        lengths[sequence, -2] = 1 + min(done, 3)
        lengths[sequence, -1] = 2 if done else 0
    width = context.pages + (1 if any(blocks_done) else 0)
    return replace(context, page_table=np.ascontiguousarray(table[:, :width]),
                   page_lengths=np.ascontiguousarray(lengths[:, :width]),
                   page_segments=np.ascontiguousarray(labels[:, :width]))


@every_policy
@pytest.mark.clause("POLICY-2", "MEMORY-1")
def test_sequences_at_different_passes_and_blocks_get_what_each_gets_alone(policy: str) -> None:
    calls = 9
    block = make_block(2, passes=calls)
    attention = PrefixAttention(policy)
    _, _, q_heads, tokens, _ = block.q.shape
    together = []
    memory = None
    for call in range(calls):
        index = np.array([call % length for length in LENGTH_OF_BLOCKS], np.int32)
        save = index == np.array(LENGTH_OF_BLOCKS) - 1
        context = grown(block.context, [call // length for length in LENGTH_OF_BLOCKS])
        info = PassInfo(index, is_save=save, newly_decoded=block.newly[call], layer=1, num_layers=4)
        out, memory = attention(block.q[call], block.k, block.v, context, memory, info)
        together.append((out, memory.active, rows_read(memory, q_heads, tokens)))
    for sequence, length in enumerate(LENGTH_OF_BLOCKS):
        memory = None
        for call in range(calls):
            rows = slice(sequence, sequence + 1)
            done = [0, 0]
            done[sequence] = call // length
            whole = grown(block.context, done)
            context = replace(whole, page_table=whole.page_table[rows], version=call // length,
                              page_lengths=whole.page_lengths[rows],
                              page_segments=whole.page_segments[rows])
            info = PassInfo(call % length, is_save=call % length == length - 1, layer=1, num_layers=4,
                            newly_decoded=block.newly[call][rows])
            out, memory = attention(
                block.q[call][rows], block.k[rows], block.v[rows], context, memory, info
            )
            all_out, all_active, all_read = together[call]
            np.testing.assert_array_equal(all_active[sequence], memory.active[0])
            read = rows_read(memory, q_heads, tokens)[0]
            np.testing.assert_array_equal(all_read[sequence][..., : read.shape[-1]], read)
            assert not all_read[sequence][..., read.shape[-1] :].any()
            np.testing.assert_allclose(all_out[sequence], out[0], rtol=0, atol=2e-6)


@every_policy
@pytest.mark.clause("MEMORY-3", "POLICY-3")
def test_no_memory_in_the_middle_of_a_block_starts_it_again(policy: str) -> None:
    block = make_block(3)
    attention = PrefixAttention(policy)
    runs = []
    for first in (0, 2):
        memory = None
        for step in range(3):
            info = PassInfo(first + step, newly_decoded=block.newly[step], layer=1, num_layers=4)
            out, memory = attention(block.q[step], block.k, block.v, block.context, memory, info)
            assert step > 0 or memory.active.all()
            runs.append(out)
    for from_start, from_middle in zip(runs[:3], runs[3:], strict=True):
        np.testing.assert_array_equal(from_start, from_middle)


@every_policy
@pytest.mark.clause("CONTEXT-2", "POLICY-4", "DRIVER-2")
def test_what_does_not_exist_changes_nothing(policy: str) -> None:
    block = make_block(4)
    c = block.context
    keys, values, table = c.k_pages.copy(), c.v_pages.copy(), c.page_table.copy()
    spare = np.setdiff1d(np.arange(len(keys)), table[c.page_lengths > 0])
    keys[spare], values[spare] = np.nan, np.inf
    for b, page in np.argwhere(c.page_lengths >= 0):
        length = c.page_lengths[b, page]
        keys[table[b, page], :, length:] = np.nan
        values[table[b, page], :, length:] = np.inf
    table[c.page_lengths == 0] = 2**31 - 1
    poisoned = replace(block, context=replace(c, k_pages=keys, v_pages=values, page_table=table))
    for (out, memory), (other_out, other) in zip(
        denoise(policy, block), denoise(policy, poisoned), strict=True
    ):
        np.testing.assert_array_equal(memory.active, other.active)
        np.testing.assert_array_equal(decisions(block, memory)[1], decisions(block, other)[1])
        np.testing.assert_array_equal(out, other_out)


@every_policy
@pytest.mark.clause("CONTEXT-3")
def test_physical_order_of_the_pages_changes_nothing(policy: str) -> None:
    block = make_block(5)
    c = block.context
    order = np.random.default_rng(0).permutation(len(c.k_pages))
    moved = replace(c, k_pages=c.k_pages[order], v_pages=c.v_pages[order],
                    page_table=np.argsort(order)[c.page_table].astype(np.int32))
    for (out, memory), (other_out, other) in zip(
        denoise(policy, block), denoise(policy, replace(block, context=moved)), strict=True
    ):
        np.testing.assert_array_equal(decisions(block, memory)[1], decisions(block, other)[1])
        np.testing.assert_array_equal(out, other_out)


@every_policy
def test_an_empty_context_leaves_attention_within_the_block(policy: str) -> None:
    block = make_block(6)
    nothing = np.zeros_like(block.context.page_lengths)
    for lengths in (nothing, nothing[:, :0]):
        c = block.context
        context = replace(c, page_lengths=lengths, page_table=c.page_table[:, : lengths.shape[1]],
                          page_segments=c.page_segments[:, : lengths.shape[1]])
        empty = replace(block, context=context)
        others = denoise(policy, empty, AnyArrayBackend())
        for index, (out, memory) in enumerate(denoise(policy, empty)):
            np.testing.assert_allclose(out, next(others)[0], atol=1e-6)
            alone = PrefixAttention("dense").backend.attend_block(block.q[index], block.k, block.v).out
            np.testing.assert_allclose(out, alone, atol=1e-6)
            np.testing.assert_array_equal(memory.traffic.density, 0)


def from_torch(array: Array) -> Any:
    return pytest.importorskip("torch").from_numpy(np.array(array))


@pytest.mark.parametrize(
    ("convert", "sizes"),
    [(np.asarray, (4, 2)), (array_api_strict.asarray, (7, 1)), (from_torch, (8, 4))],
    ids=["numpy, group 2", "array_api_strict, group 7", "torch, group 2"],
)
@every_policy
@pytest.mark.clause("POLICY-1")
def test_decisions_and_outputs_agree_in_every_array_library(
    policy: str, sizes: tuple[int, int], convert: Callable[[Array], Any]
) -> None:
    block = make_block(7, q_heads=sizes[0], kv_heads=sizes[1])
    other = block.converted(convert)
    for (out, memory), (other_out, elsewhere) in zip(
        denoise(policy, block), denoise(policy, other, AnyArrayBackend()), strict=True
    ):
        assert type(other_out) is type(other.k)
        np.testing.assert_array_equal(memory.active, np.asarray(elsewhere.active))
        np.testing.assert_array_equal(decisions(block, memory)[1], decisions(block, elsewhere)[1])
        np.testing.assert_allclose(out, np.asarray(other_out), atol=3e-6)
        np.testing.assert_allclose(memory.traffic.bytes_read, np.asarray(elsewhere.traffic.bytes_read))


@pytest.mark.parametrize("uniform", [True, False], ids=["one index", "an index a sequence"])
@every_policy
@pytest.mark.clause("SYNC-1")
def test_a_pass_never_looks_at_values(policy: str, uniform: bool) -> None:
    """Tensors on PyTorch's meta device have shapes and no values: any look at one raises."""
    torch = pytest.importorskip("torch")
    block = make_block(8).converted(lambda array: torch.from_numpy(np.array(array)).to("meta"))
    attention = PrefixAttention(policy, AnyArrayBackend())
    memory = None
    for step in range(block.passes):
        index = step if uniform else torch.empty(2, dtype=torch.int32, device="meta")
        info = PassInfo(index, newly_decoded=block.newly[step], layer=1, num_layers=4)
        out, memory = attention(block.q[step], block.k, block.v, block.context, memory, info)
    assert out.shape == block.q[0].shape


@every_policy
@pytest.mark.clause("MEMORY-2")
def test_memory_of_a_context_that_has_changed_is_refused(policy: str) -> None:
    block = make_block(9)
    attention = PrefixAttention(policy)
    _, memory = attention(block.q[0], block.k, block.v, block.context)
    longer = replace(block.context, page_lengths=np.full_like(block.context.page_lengths, 4))
    for context in (replace(block.context, version=1), longer):
        with pytest.raises(StaleMemoryError, match="context changed"):
            attention(block.q[1], block.k, block.v, context, memory,
                      PassInfo(1, newly_decoded=block.newly[1]))


@every_policy
@pytest.mark.clause("PURE-1", "POLICY-1")
def test_memory_does_not_change_with_the_array_that_the_queries_came_in(policy: str) -> None:
    """Engines write every pass's queries into one buffer."""
    block = make_block(10)
    attention = PrefixAttention(policy)
    buffer = block.q[0].copy()
    memory = None
    for index, (out, kept) in enumerate(denoise(policy, block, save=False)):
        buffer[...] = block.q[index]
        info = PassInfo(index, newly_decoded=block.newly[index], layer=1, num_layers=4)
        again, memory = attention(buffer, block.k, block.v, block.context, memory, info)
        np.testing.assert_array_equal(memory.active, kept.active)
        np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize(
    "generous",
    ["sliding-window:window=10000000000", "streaming-llm:sinks=20,window=16", "quest:budget=36",
     "quest:budget=10000000000,pages=own,newest=true", "losa:active=10000000000,budget=36",
     "mage:budget=36,dense_layers=0", "sparsed:warmup=1,ratio=1", "flashblock:limit=0",
     "quest:dense_layers=2", "losa:dense_layers=2,save_pass=reuse"],
)
@pytest.mark.clause("POLICY-6")
def test_a_budget_as_long_as_the_context_is_dense_attention(generous: str) -> None:
    block = make_block(11, segments=False)  # 9 pages of 4 tokens
    for (out, memory), (dense_out, _) in zip(
        denoise(generous, block), denoise("dense", block), strict=True
    ):
        np.testing.assert_allclose(out, dense_out, atol=2e-6)
        np.testing.assert_array_equal(memory.traffic.density, 1)


@pytest.mark.parametrize(("page_size", "pages"), [(1, 9), (4, 1), (16, 3)])
@pytest.mark.parametrize("last", ["one token", "full"])
@every_policy
def test_last_pages_of_any_length_are_read_or_left_but_never_misread(
    policy: str, page_size: int, pages: int, last: str
) -> None:
    block = make_block(12, page_size=page_size, pages=max(pages, 4))
    lengths = np.full((2, pages), page_size, np.int32)
    lengths[:, -1] = 1 if last == "one token" else page_size
    c = block.context
    context = replace(c, page_table=c.page_table[:, :pages].copy(), page_lengths=lengths, page_segments=None)
    for index, (out, memory) in enumerate(denoise(policy, replace(block, context=context))):
        # Whatever was chosen, attention over it is one softmax over those tokens and the block's.
        if index == 0:
            state = memory.state
            direct = PrefixAttention("dense").backend.attend_pages(
                block.q[0], context, memory.selection, memory.active
            )
            np.testing.assert_allclose(state.lse, direct.lse, atol=1e-6)
        assert np.isfinite(out).all()
        assert (np.asarray(memory.traffic.density) <= 1).all()
