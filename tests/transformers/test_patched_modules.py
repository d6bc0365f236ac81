"""Models whose attention modules are patched: Qwen3 and Llama of transformers, and stand-ins for others."""

from __future__ import annotations

import copy
from typing import Any

import module_stand_ins as stand_ins
import pytest
import torch
from patched_blocks import BLOCK, PREFIX, block_causal, held, one_pass, prefilled, random_stack, rows
from tiny_models import FAMILIES, assert_within_budget, cache_name, causal_shape, in_double, new_cache, tokens

from sparse_dlm_attn import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn_transformers import CONTRACTS, ModuleContract, PassReport, SparseAttention


@pytest.fixture(scope="module")
def model() -> Any:
    return causal_shape("Qwen3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["dense", "quest:budget=4096"])
def test_every_family_gets_its_own_logits(family: str, policy: str) -> None:
    model = causal_shape(family)
    eager, exact = one_pass(model, 2), one_pass(in_double(model), 2)
    with torch.no_grad(), SparseAttention(model, policy, page_size=4) as sparse:
        cache = prefilled(model, 2)
        with sparse.block():
            logits = model(tokens(2, PREFIX + BLOCK)[:, PREFIX:], **cache).logits
    assert_within_budget(logits, eager, exact)


@pytest.mark.parametrize("policy", ["dense", "quest:budget=4096", "losa:budget=4096,active=2"])
@pytest.mark.parametrize("mask", ["none", "block-causal", "padding"])
def test_a_block_over_the_cache_equals_one_dense_pass(model: Any, policy: str, mask: str) -> None:
    eager, exact = one_pass(model, 2), one_pass(in_double(model), 2)
    masks = {
        "none": None,
        "block-causal": torch.zeros(1, 1, BLOCK, PREFIX + BLOCK),
        "padding": torch.ones(2, PREFIX + BLOCK, dtype=torch.long),
    }
    block = tokens(2, PREFIX + BLOCK)[:, PREFIX:]
    with torch.no_grad(), SparseAttention(model, policy, page_size=4) as sparse:
        cache = prefilled(model, 2)
        with sparse.block():
            for is_save in (False, False, True):
                assert held(cache).get_seq_length() == PREFIX
                sparse.next_pass(is_save=is_save)
                logits = model(block, attention_mask=masks[mask], **cache).logits
                assert_within_budget(logits, eager, exact)
        assert held(cache).get_seq_length() == PREFIX + BLOCK
    assert torch.equal(one_pass(model, 2), eager)  # given back as it was


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_padded_on_either_side_get_what_they_get_alone(model: Any, side: str) -> None:
    """Prompts of 40, 25 and 3 tokens in one batch; keys that a pass may not read are poisoned."""
    double, block = in_double(model), tokens(3, BLOCK, 4)
    lengths, name = [PREFIX, 25, 3], cache_name(model)
    places = torch.arange(PREFIX)
    valid = torch.stack([places >= PREFIX - n if side == "left" else places < n for n in lengths])
    expected, cache = [], new_cache(double)
    with torch.no_grad(), SparseAttention(double, "dense", page_size=4) as sparse:
        alone = []
        for row, length in enumerate(lengths):
            alone.append({name: new_cache(double)})
            double(tokens(1, length, row), attention_mask=torch.zeros(1, 1, length, length), **alone[-1])
            with sparse.block():
                positions = torch.arange(length, length + BLOCK)[None]
                out = double(block[row : row + 1], position_ids=positions, **alone[-1])
            expected.append(out.logits)
        for layer in range(double.config.num_hidden_layers):
            sides = torch.full((2, 3, 2, PREFIX, 16), torch.nan, dtype=torch.float64)
            for row in range(3):
                for side, part in zip(sides, stand_ins.cached(held(alone[row]), layer), strict=True):
                    side[row, :, valid[row]] = part[0]
            cache.update(*sides, layer)
        mask = torch.cat([valid, torch.ones(3, BLOCK, dtype=torch.bool)], dim=1)
        positions = torch.tensor(lengths)[:, None] + torch.arange(BLOCK)
        with sparse.block():
            together = double(block, attention_mask=mask, position_ids=positions, **{name: cache}).logits
    torch.testing.assert_close(together, torch.cat(expected))


def test_the_first_block_of_an_empty_cache_reads_itself_alone(model: Any) -> None:
    block = tokens(1, BLOCK)
    with torch.no_grad():
        expected = model(block, attention_mask=torch.zeros(1, 1, BLOCK, BLOCK)).logits
        told = pytest.warns(UserWarning, match=r"no block had a context.*scope='sequence'")
        with told, SparseAttention(model, "quest") as sparse, sparse.block():
            for arguments in ({}, {cache_name(model): new_cache(model)}):
                torch.testing.assert_close(model(block, **arguments).logits, expected)


def test_every_contract_is_tested_on_what_it_says() -> None:
    tested = {f"{family}Attention" for family in FAMILIES} | set(dir(stand_ins))
    assert not [contract.classes for contract in CONTRACTS if not tested & set(contract.classes)]


class Mine(torch.nn.Module):
    """A class of a user's own, with names of its own."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(32, 32), torch.nn.Linear(32, 16), torch.nn.Linear(32, 16))
        self.back = torch.nn.Linear(32, 32)

    def split(self, x: Any) -> Any:
        heads = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        return tuple(heads)

    def forward(self, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        out = stand_ins.plain_attention(*self.split(hidden_states), None)
        return self.back(out.flatten(2))


def test_a_class_of_ones_own_is_registered_by_its_contract() -> None:
    stack = random_stack(stand_ins.Stack, Mine)
    with pytest.raises(InvalidArgumentError, match=r"contract=ModuleContract"):
        SparseAttention(stack, "dense")
    mine = ModuleContract(
        classes=("Mine",),
        models="mine",
        scope="sequence",
        attributes=("to_q", "to_k", "to_v"),
        output="back",
        project=lambda module, call: module.split(call["hidden_states"]),
        returns=1,
    )
    with torch.no_grad():
        own, exact = stack(rows(24, 0)), copy.deepcopy(stack).double()(rows(24, 0, torch.float64))
        with SparseAttention(stack, "dense", contract=mine) as sparse, sparse.block():
            assert_within_budget(stack(rows(24, 0)), own, exact)
    with pytest.raises(InvalidArgumentError, match=r"classes: Mine; got a Qwen3ForCausalLM"):
        SparseAttention(causal_shape("Qwen3"), "dense", contract=mine)
    with pytest.raises(InvalidTypeError, match="contract must be a ModuleContract or None; got str"):
        SparseAttention(stack, "dense", contract="Mine")  # type: ignore[arg-type]


def test_a_subclass_counts_as_what_it_inherits_unless_it_attends_by_itself() -> None:
    model = causal_shape("Qwen2")
    kind = type(model.model.layers[0].self_attn)
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("A2DAttention", (kind,), {})
    with SparseAttention(model, "dense"):
        pass
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("OtherAttention", (kind,), {"forward": lambda self, x: x})
    with pytest.raises(InvalidArgumentError, match="a Qwen2ForCausalLM with OtherAttention"):
        SparseAttention(model, "dense")


def test_a_causal_model_can_be_a_whole_sequence_diffuser(model: Any) -> None:
    ids = tokens(1, PREFIX)
    every = torch.zeros(1, 1, PREFIX, PREFIX)
    reports: list[PassReport] = []
    with torch.no_grad():
        own = model(ids, attention_mask=every).logits
        with SparseAttention(model, "dense", scope="sequence") as sparse, sparse.block():
            torch.testing.assert_close(model(ids, attention_mask=every).logits, own)
        sparse = SparseAttention(
            model, "sliding-window:window=8", page_size=4, scope="sequence", on_pass=reports.append
        )
        with sparse, sparse.block():
            model(ids, attention_mask=every)
        assert len(reports) == 1
        assert all((one.pairs < one.dense_pairs / 2).all() for one in reports[0].traffic)
        with SparseAttention(model, "dense", scope="sequence") as sparse, sparse.block():
            refusal = pytest.raises(InvalidArgumentError, match=r"every other where the block is the whole")
            with refusal:
                model(ids, attention_mask=block_causal(PREFIX, model.dtype))
    with pytest.raises(InvalidArgumentError, match="scope must be one of prefix, sequence; got 'whole'"):
        SparseAttention(model, "dense", scope="whole")  # type: ignore[arg-type]


def test_decoded_tokens_reach_policies_that_ask_for_them(model: Any) -> None:
    with torch.no_grad(), SparseAttention(model, "flashblock", page_size=4) as sparse:
        cache, decoded = prefilled(model), torch.zeros(1, BLOCK, dtype=torch.bool)
        with sparse.block():
            for index in range(3):
                sparse.next_pass(decoded)
                model(tokens(1, BLOCK), **cache)
                decoded[0, index] = True
        with sparse.block():
            model(tokens(1, BLOCK), **cache)
            with pytest.raises(InvalidArgumentError, match="decoded"):
                model(tokens(1, BLOCK), **cache)


def test_autocast_works_as_for_the_models_own_attention(model: Any) -> None:
    block = tokens(1, PREFIX + BLOCK)[:, PREFIX:]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        own, exact = one_pass(model), one_pass(in_double(model))
        with SparseAttention(model, "dense", page_size=4) as sparse:
            cache = prefilled(model)
            with sparse.block():
                logits = model(block, **cache).logits
                sparse.next_pass(is_save=True)
                model(block, **cache)
            assert held(cache).get_seq_length() == PREFIX + BLOCK
    assert logits.dtype == own.dtype
    error, theirs = ((x.double() - exact.double()).abs().max().item() for x in (logits, own))
    assert error <= 2 * theirs


def snapkv_blocks(sparse: Any, model: Any, cache: dict[str, Any], blocks: int, batch: int = 1) -> list[Any]:
    """Decode blocks that append to the cache; return which pages the last layer read in each."""
    chosen = []
    for number in range(blocks):
        block = tokens(batch, BLOCK, 7 + number)
        with sparse.block():
            model(block, **cache)
            sparse.next_pass(is_save=True)
            model(block, **cache)
            chosen.append(sparse.decoder.memories[-1].selection.mask.clone())
    return chosen


SNAPKV = "snapkv:capacity=12,window=4"


def test_a_new_prompt_is_not_answered_with_the_pages_of_the_one_before(model: Any) -> None:
    with torch.no_grad(), SparseAttention(model, SNAPKV, page_size=4) as sparse:
        for count in (PREFIX, PREFIX, PREFIX - 8):  # another one of the same length, and a shorter one
            cache = {cache_name(model): new_cache(model)}
            model(tokens(1, count, count), **cache)
            assert sparse.decoder.memories[0] is None
            first, second = snapkv_blocks(sparse, model, cache, 2)
            assert torch.equal(first[..., : count // 4], second[..., : count // 4])
            assert sparse.decoder.memories[0] is not None  # kept for the sequence
        sparse.reset()
        assert sparse.decoder.memories[0] is None


@pytest.mark.parametrize("call", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "by hand"])
def test_sequences_take_along_what_was_chosen_for_them(model: Any, call: str) -> None:
    moves = {"batch_repeat_interleave": [0, 0, 1, 1]}.get(call, [1, 0])
    with torch.no_grad(), SparseAttention(model, SNAPKV, page_size=4) as sparse:
        cache = prefilled(model, 2)
        (before,) = snapkv_blocks(sparse, model, cache, 1, 2)
        if call == "by hand":
            held(cache).reorder_cache = lambda indices: type(held(cache)).reorder_cache(held(cache), indices)
            sparse.reorder(torch.tensor(moves))
        method = getattr(held(cache), "reorder_cache" if call == "by hand" else call)
        method(2 if call == "batch_repeat_interleave" else torch.tensor(moves))
        (after,) = snapkv_blocks(sparse, model, cache, 1, len(moves))
        pages = PREFIX // 4
        assert torch.equal(after[..., :pages], before[moves][..., :pages])
        assert not torch.equal(before[0], before[1])
        copied = copy.deepcopy(held(cache))
        copied.reorder_cache(torch.tensor([0] * len(moves)))  # nobody follows a copy
        assert sparse.decoder.memories[0].state.out.shape[0] == len(moves)
    assert "reorder_cache" not in vars(held(cache)) or call == "by hand"
