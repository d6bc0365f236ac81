"""What models with patched modules refuse, or read of what they are given."""

from __future__ import annotations

from typing import Any

import module_stand_ins as stand_ins
import pytest
import torch
from patched_blocks import BLOCK, PREFIX, held, one_pass, prefilled, random_stack, rows, stand_ins_cache
from tiny_models import assert_within_budget, causal_shape, in_double, tokens

from sparse_dlm_attn import CallOrderError, InvalidArgumentError, InvalidTypeError, StaleMemoryError, UnknownNameError
from sparse_dlm_attn_transformers import SparseAttention
from sparse_dlm_attn_transformers.masks import visible_context


@pytest.fixture(scope="module")
def model() -> Any:
    return causal_shape("Qwen3")


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
