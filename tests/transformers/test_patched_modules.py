"""Models whose attention modules are patched: Qwen3 and Llama of transformers, and stand-ins for others."""

from __future__ import annotations

import copy
from typing import Any

import module_stand_ins as stand_ins
import pytest
import torch
from tiny_models import FAMILIES, assert_within_budget, cache_name, causal_shape, in_double, new_cache, tokens

from sparse_dlm_attn import CallOrderError, InvalidArgumentError, InvalidTypeError, StaleMemoryError, UnknownNameError
from sparse_dlm_attn_transformers import CONTRACTS, ModuleContract, PassReport, SparseAttention
from sparse_dlm_attn_transformers.masks import visible_context

BLOCK, PREFIX = 8, 40


def block_causal(length: int, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask: every token sees its own block and the blocks before."""
    blocks = torch.arange(length) // BLOCK
    hidden = blocks[:, None] < blocks[None, :]
    return torch.zeros(length, length, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def one_pass(model: Any, batch: int = 1) -> torch.Tensor:
    """Logits of the last block of one dense pass over everything, block-causal."""
    with torch.no_grad():
        mask = block_causal(PREFIX + BLOCK, model.dtype)
        logits: torch.Tensor = model(tokens(batch, PREFIX + BLOCK), attention_mask=mask).logits
    return logits[:, PREFIX:]


def prefilled(model: Any, batch: int = 1) -> dict[str, Any]:
    """The cache of the prefix, as an argument for the model's forward pass."""
    cache = {cache_name(model): new_cache(model)}
    with torch.no_grad():
        prefix = tokens(batch, PREFIX + BLOCK)[:, :PREFIX]
        model(prefix, attention_mask=block_causal(PREFIX, model.dtype), **cache)
    return cache


def held(cache: dict[str, Any]) -> Any:
    return next(iter(cache.values()))


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


def random_stack(kind: Any, *arguments: Any) -> Any:
    torch.manual_seed(0)
    stack = kind(*arguments).eval()
    for parameter in stack.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    return stack


def rows(count: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, count, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stand_ins_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


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


def test_a_session_without_blocks_says_so_when_it_ends(model: Any) -> None:
    told = pytest.warns(UserWarning, match=r"2 forward passes.*none of them within a block.*sparse\.block\(\)")
    with torch.no_grad(), told, SparseAttention(model, "quest"):
        for _ in range(2):
            model(tokens(1, BLOCK))
    with SparseAttention(model, "quest"):  # nothing ran, so there is nothing to say
        pass


def test_unknown_models_are_refused_with_what_is_known() -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

    with pytest.raises(InvalidArgumentError, match=r"SDARAttention.*Strange with Multihead.*Decoder"):
        SparseAttention(Strange().eval(), "dense")
    with pytest.raises(InvalidTypeError, match=r"model must be a torch\.nn\.Module; got str"):
        SparseAttention("google/diffusiongemma", "dense")  # type: ignore[arg-type]
    broken = random_stack(stand_ins.Stack, stand_ins.SDARAttention)
    del broken.layers[1].self_attn.q_norm
    with pytest.raises(InvalidArgumentError, match=r"q_norm.*in layers\.1\.self_attn.*one without q_norm"):
        SparseAttention(broken, "dense")
    sliding = random_stack(stand_ins.Stack, stand_ins.SDARAttention)
    sliding.layers[0].self_attn.sliding_window = 16
    with pytest.raises(InvalidArgumentError, match=r"sliding window of 16 tokens.*use_sliding_window=False"):
        SparseAttention(sliding, "dense")


def test_a_refused_attachment_leaves_the_model_as_it_was(model: Any) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dense'"):
        SparseAttention(model, "densee")
    with pytest.raises(UnknownNameError, match="unknown backend"):
        SparseAttention(model, "dense", "toch")
    with pytest.raises(InvalidArgumentError, match="page_size must be at least 1"):
        SparseAttention(model, "dense", page_size=0)
    with SparseAttention(model, "dense"):
        pass


def test_masks_that_sparse_attention_cannot_honour_are_refused(model: Any) -> None:
    block, keys = tokens(1, BLOCK), PREFIX + BLOCK
    causal = torch.ones(BLOCK, keys, dtype=torch.bool).tril(PREFIX)[None, None]
    ragged = torch.ones(1, 1, BLOCK, keys, dtype=torch.bool)
    ragged[0, 0, 3, 5] = False
    bias = torch.full((1, 1, BLOCK, keys), -0.5)
    cases = [
        (causal, r"whole block to each of its tokens; got a mask \(1, 1, 8, 48\) of bool.*block-causal"),
        (ragged, "same tokens of the context.*whose rows differ"),
        (bias, r"0 and 1, or numbers to add.*\(1, 1, 8, 48\) of float32 with other numbers, a bias"),
        (torch.ones(1, 3), r"must have shape \(1, 48\), \(1, 8, 48\) or .*; got a mask \(1, 3\) of float32"),
    ]
    with torch.no_grad(), SparseAttention(model, "dense") as sparse:
        cache = prefilled(model)
        for mask, words in cases:
            with sparse.block(), pytest.raises(InvalidArgumentError, match=words):
                model(block, attention_mask=mask, **cache)
    whole = random_stack(stand_ins.LLaDA)
    refusal = pytest.raises(InvalidArgumentError, match="must leave every sequence a token; got nothing in seq")
    with torch.no_grad(), SparseAttention(whole, "dense") as sparse, sparse.block(), refusal:
        whole(rows(16, 0), attention_mask=torch.zeros(1, 16))


SEEN = torch.ones(1, BLOCK, PREFIX + BLOCK, dtype=torch.bool)
SEEN[:, :, :7] = False


@pytest.mark.parametrize(
    "mask",
    [
        SEEN[:, 0],
        SEEN[:, 0].long(),
        SEEN[:, 0].float(),
        SEEN,
        SEEN.float(),
        SEEN[:, None],
        SEEN[:, None].half(),
        torch.zeros(SEEN.shape).masked_fill(~SEEN, -torch.inf),
        torch.zeros(SEEN.shape).masked_fill(~SEEN, -1e9)[:, None],
        SEEN[:, None].expand(1, 4, -1, -1),
    ],
    ids=lambda mask: f"{str(mask.dtype).removeprefix('torch.')} of {mask.ndim} axes",
)
def test_every_form_of_mask_is_read_alike(mask: torch.Tensor) -> None:
    expected = SEEN[:, 0, :PREFIX].numpy()
    assert (visible_context(mask, 1, PREFIX, BLOCK) == expected).all()


def test_masks_that_hide_nothing_are_read_as_such() -> None:
    whole = (1, BLOCK, PREFIX + BLOCK)
    for mask in (None, "full", torch.zeros(whole), torch.ones(whole), torch.ones(whole, dtype=torch.long)):
        assert visible_context(mask, 1, PREFIX, BLOCK).all()
    places = torch.ones(BLOCK, PREFIX + BLOCK, dtype=torch.bool)  # rows and keys, as a module gets them
    assert visible_context(places, 1, PREFIX, BLOCK, of_module=True).all()
    assert visible_context(places[:1], 1, PREFIX, BLOCK).all()  # sequences and keys


def test_caches_that_cannot_be_viewed_are_refused(model: Any) -> None:
    cache = prefilled(model)
    layers = getattr(held(cache), "layers", None)
    if layers is None:
        pytest.skip("caches of layers came with transformers 4.54")
    for layer in layers:
        layer.__class__ = type("RollingLayer", (type(layer),), {})
    refused = pytest.raises(InvalidArgumentError, match=r"DynamicCache, a PagedCache.*got a RollingLayer")
    with torch.no_grad(), SparseAttention(model, "dense") as sparse, sparse.block(), refused:
        model(tokens(1, BLOCK), **cache)


def test_calls_out_of_order_are_refused(model: Any) -> None:
    with torch.no_grad(), SparseAttention(model, "dense") as sparse:
        cache = prefilled(model)
        with pytest.raises(CallOrderError, match=r"next_pass\(\) must be called within a block"):
            sparse.next_pass()
        with sparse.block():
            with pytest.raises(CallOrderError, match=r"Call finish_block\(\) first"):
                sparse.start_block()
            with pytest.raises(CallOrderError, match="within the model's forward pass"):
                model.model.layers[0].self_attn(
                    torch.zeros(1, BLOCK, 32), (torch.ones(1, BLOCK, 16), torch.zeros(1, BLOCK, 16)), None
                )
            model(tokens(1, BLOCK), **cache)
            held(cache).crop(-1)
            with pytest.raises(StaleMemoryError, match="changed in the middle of a block"):
                model(tokens(1, BLOCK), **cache)


def test_a_block_cache_that_was_filled_elsewhere_is_refused() -> None:
    model, ids = stand_ins.FastDLLM().eval(), tokens(1, BLOCK)
    with torch.no_grad():
        cache = model(ids, update_past_key_values=True).past_key_values
        held = model(ids, past_key_values=cache, use_block_cache=True).block_past_key_values
        refusal = pytest.raises(StaleMemoryError, match="8 rows that were not computed in this block")
        with SparseAttention(model, "dense") as sparse, sparse.block(), refusal:
            model(
                ids[:, :4], past_key_values=cache, use_block_cache=True, block_past_key_values=held, replace_position=0
            )


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


def test_policies_that_leave_rows_out_are_told_that_the_model_computes_all(model: Any) -> None:
    eager, exact = one_pass(model), one_pass(in_double(model))
    with torch.no_grad(), SparseAttention(model, "dkv-cache", page_size=4) as sparse:
        cache = prefilled(model)
        with sparse.block():
            with pytest.raises(InvalidArgumentError, match="decoded must be None for 'dkv-cache'"):
                sparse.next_pass(torch.ones(1, BLOCK, dtype=torch.bool))
            logits = model(tokens(1, PREFIX + BLOCK)[:, PREFIX:], **cache).logits
            assert_within_budget(logits, eager, exact)


def test_training_mode_within_a_block_is_refused(model: Any) -> None:
    with torch.no_grad(), SparseAttention(model, "dense") as sparse:
        cache = prefilled(model)
        try:
            model.model.layers[1].train()  # a part, as training of adapters does
            model(tokens(1, BLOCK))  # outside of a block it is the model's own affair
            with sparse.block(), pytest.raises(InvalidArgumentError, match=r"eval mode.*model\.eval"):
                model(tokens(1, BLOCK), **cache)
        finally:
            model.eval()


def test_arguments_given_by_position_are_not_overlooked() -> None:
    class ByPosition(stand_ins.Layer):
        def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            names = ("attention_mask", "position_ids", "past_key_value", "position_embeddings")
            out = self.self_attn(x, *(kwargs.pop(name) for name in names), **kwargs)
            return x + (out[0] if isinstance(out, tuple) else out)

    for kind in (stand_ins.SDARAttention, stand_ins.DreamAttention):
        stack, cache = random_stack(stand_ins.Stack, kind), stand_ins_cache()
        for layer in stack.layers:
            layer.__class__ = ByPosition
        with torch.no_grad(), SparseAttention(stack, "dense") as sparse:
            stack(rows(BLOCK, 0), past_key_values=cache, store_kv=True)
            if kind is stand_ins.DreamAttention:
                with sparse.block(), pytest.raises(InvalidArgumentError, match="past_key_value must be None"):
                    stack(rows(BLOCK, 1), past_key_values=cache)
                continue
            own = stack(rows(BLOCK, 1), past_key_values=cache)
            twice = r"hidden_states must be given to SDARAttention once"
            with sparse.block(), pytest.raises(InvalidArgumentError, match=twice):
                stack.layers[0].self_attn(rows(BLOCK, 1), hidden_states=rows(BLOCK, 1))
            with sparse.block():
                torch.testing.assert_close(stack(rows(BLOCK, 1), past_key_values=cache), own)


def test_what_is_attached_can_be_found_by_its_model(model: Any) -> None:
    assert SparseAttention.of(model) is None
    with pytest.raises(InvalidTypeError, match=r"model must be a torch\.nn\.Module; got str"):
        SparseAttention.of("a name")  # type: ignore[arg-type]
    SparseAttention(model, "dense")  # nobody keeps it
    with pytest.raises(CallOrderError, match=r"only one attached.*SparseAttention\.of\(model\)"):
        SparseAttention(model, "dense")
    found = SparseAttention.of(model)
    assert found is not None
    found.detach()
    assert SparseAttention.of(model) is None


def test_backends_and_caches_that_do_not_fit_the_model_are_refused(model: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"tensors of PyTorch.*'reference'"):
        SparseAttention(model, "dense", "reference")
    with torch.no_grad(), SparseAttention(model, "dense") as sparse:
        cache = prefilled(model)
        with sparse.block(), pytest.raises(InvalidArgumentError, match=r"as many sequences.* 2; got 1"):
            model(tokens(2, BLOCK), **cache)


def test_a_mask_that_changes_within_a_block_is_refused(model: Any) -> None:
    full = torch.ones(1, PREFIX + BLOCK, dtype=torch.long)
    padded = full.clone()
    padded[:, :7] = 0
    block = tokens(1, BLOCK)
    with torch.no_grad(), SparseAttention(model, "dense", page_size=4) as sparse:
        cache = prefilled(model)
        for first, second in ((None, padded), (full, padded), (padded, None)):
            with sparse.block():
                model(block, attention_mask=first, **cache)
                with pytest.raises(InvalidArgumentError, match=r"same tokens of the cache.*finish_block"):
                    model(block, attention_mask=second, **cache)
        with sparse.block():  # the same in other words
            expected = model(block, attention_mask=padded, **cache).logits
            assert torch.equal(model(block, attention_mask=padded.bool(), **cache).logits, expected)
            every_row = padded.bool()[:, None, None].expand(1, 1, BLOCK, -1)
            assert torch.equal(model(block, attention_mask=every_row, **cache).logits, expected)


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
