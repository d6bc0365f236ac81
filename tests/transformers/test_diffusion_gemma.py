"""DiffusionGemma through its attention interface, with its own loop."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers
from tiny_models import CANVAS, assert_within_budget, cache_name, diffusion_gemma, in_double, new_cache, tokens

from sparse_dlm_attn import CallOrderError, InvalidArgumentError, list_policies
from sparse_dlm_attn_transformers import NAME, PassReport, SparseAttention

if not hasattr(transformers, "DiffusionGemmaConfig"):
    pytest.skip("DiffusionGemma came with transformers 5.17", allow_module_level=True)

PROMPT = 40  # longer than the sliding window


@pytest.fixture(scope="module")
def model() -> Any:
    return diffusion_gemma()


def padding(lengths: list[int], side: str) -> torch.Tensor:
    """A mask ``(batch, PROMPT)`` of prompts padded on one side."""
    places = torch.arange(PROMPT)
    rows = [places >= PROMPT - n if side == "left" else places < n for n in lengths]
    return torch.stack(rows).long()


def forward(model: Any, mask: torch.Tensor, seed: int = 2) -> torch.Tensor:
    """Encode a prompt and run one pass over a canvas."""
    batch = mask.shape[0]
    with torch.no_grad():
        out = model(
            input_ids=tokens(batch, PROMPT),
            attention_mask=mask,
            decoder_input_ids=tokens(batch, CANVAS, seed),
            decoder_attention_mask=torch.cat([mask, torch.ones(batch, CANVAS, dtype=torch.long)], dim=1),
        )
    logits: torch.Tensor = out.logits
    return logits


MASKS = {
    "one sequence": padding([PROMPT], "left"),
    "left padding": padding([PROMPT, 29, 33], "left"),
    "left padding, a last prompt shorter than a page": padding([PROMPT, 5], "left"),
    "right padding": padding([PROMPT, 29], "right"),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(("page_size", "attention"), [(4, "gather"), (16, "masked")])
def test_dense_gives_the_logits_of_the_models_own_attention(
    model: Any, mask: torch.Tensor, page_size: int, attention: str
) -> None:
    eager, exact = forward(model, mask), forward(in_double(model), mask)
    with SparseAttention(model, "dense", f"torch:attention={attention}", page_size=page_size):
        actual = forward(model, mask)
    assert_within_budget(actual, eager, exact)
    assert torch.equal(forward(model, mask), eager)  # given back as it was
    assert {model.config._attn_implementation, model.config.text_config._attn_implementation} == {"eager"}


@pytest.mark.parametrize("policy", ["dense", "quest:budget=4096"])
def test_its_own_loop_decodes_the_same_tokens(policy: str) -> None:
    model = in_double(diffusion_gemma())  # so that rounding cannot turn one sampled token into another
    options: dict[str, Any] = {
        "input_ids": tokens(2, PROMPT),
        "attention_mask": MASKS["left padding"][:2],
        "max_new_tokens": 3 * CANVAS,
        "max_denoising_steps": 4,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    torch.manual_seed(3)
    expected = model.generate(**options).sequences
    reports: list[PassReport] = []
    with SparseAttention(model, policy, on_pass=reports.append) as sparse:
        torch.manual_seed(3)
        assert torch.equal(model.generate(**options).sequences, expected)
        assert not sparse.running and sparse.memory_bytes == 0
    assert [report.block for report in reports] == sorted(report.block for report in reports)
    assert {report.block for report in reports} == {0, 1, 2}
    assert [report.index for report in reports if report.block == 2][:2] == [0, 1]
    assert all(report.density == 1.0 for report in reports)


def test_memory_is_let_go_when_a_block_ends(model: Any) -> None:
    name, full = cache_name(model), torch.ones(1, PROMPT + CANVAS, dtype=torch.long)
    with torch.no_grad(), SparseAttention(model, "losa:budget=8,active=2", page_size=4) as sparse:
        cache = new_cache(model)

        def encode(count: int) -> None:
            model.model.encoder(input_ids=tokens(1, count), **{name: cache})

        encode(PROMPT)
        assert sparse.memory_bytes == 0
        for _ in range(2):
            model(decoder_input_ids=tokens(1, CANVAS), decoder_attention_mask=full, **{name: cache})
        # Heads, rows, channels of out and one of lse, bytes.
        states = sum(4 * CANVAS * (channels + 1) * 4 for channels in (256, 512))
        assert sparse.memory_bytes > states  # and bounds
        memory = sparse.decoder.memories[1]
        assert memory is not None and memory.bounds is not None
        watched = [weakref.ref(x) for x in (memory.state.out, memory.bounds.lower, memory.selection)]
        prefix = weakref.ref(cache.layers[1].keys)
        del memory
        encode(CANVAS)  # the next block's prefix: the block is over
        gc.collect()
        assert sparse.memory_bytes == 0 and not sparse.running
        assert [ref() for ref in (*watched, prefix)] == [None] * 4


def test_the_prefix_is_viewed_not_copied(model: Any) -> None:
    name, full = cache_name(model), torch.ones(1, PROMPT + CANVAS, dtype=torch.long)
    with torch.no_grad(), SparseAttention(model, "dense") as sparse:
        cache = new_cache(model)
        model.model.encoder(input_ids=tokens(1, PROMPT), **{name: cache})
        model(decoder_input_ids=tokens(1, CANVAS), decoder_attention_mask=full, **{name: cache})
        for number, layer in sparse._state.layers.items():
            held = cache.layers[number]
            for pages, dense in ((layer.context.k_pages, held.keys), (layer.context.v_pages, held.values)):
                assert pages.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr()
        assert held.keys.shape[2] == PROMPT  # and the canvas is not written behind it


def test_what_goes_wrong_is_said(model: Any) -> None:
    ids, canvas = tokens(1, PROMPT), tokens(1, CANVAS)
    with SparseAttention(model, "dense") as sparse:
        with pytest.raises(CallOrderError, match=r"only one attached; found another one\. Call its detach"):
            SparseAttention(model, "dense")
        model.set_attn_implementation("sdpa")
        words = f"must be '{NAME}' while attached; got 'sdpa'"
        with torch.no_grad(), pytest.raises(InvalidArgumentError, match=words):
            model(input_ids=ids, decoder_input_ids=canvas)
        model.set_attn_implementation({"": NAME, "text_config": NAME})
        with pytest.raises(InvalidArgumentError, match=r"DynamicCache.*StaticSliding.*cache_implementation"):
            model.generate(input_ids=ids, max_new_tokens=CANVAS, cache_implementation="static", disable_compile=True)
        assert not sparse.running
    model.set_attn_implementation({"": NAME, "text_config": NAME})
    try:
        with torch.no_grad(), pytest.raises(CallOrderError, match=r"nothing is attached.*with Sparse"):
            model(input_ids=ids, decoder_input_ids=canvas)
    finally:
        model.set_attn_implementation("eager")
    with pytest.raises(CallOrderError, match="detached from"):
        sparse.start_block()


def test_a_model_in_training_mode_is_refused() -> None:
    model = diffusion_gemma().train()
    with pytest.raises(InvalidArgumentError, match=r"eval mode.*Call model\.eval"):
        SparseAttention(model, "dense")
    assert model.config._attn_implementation == "eager"


def test_caches_are_refused_before_transformers_compiles_for_them(model: Any) -> None:
    """A compiler would report its own error, about ours."""
    refusal = pytest.raises(InvalidArgumentError, match="cache_implementation='dynamic'")
    with SparseAttention(model, "dense"), refusal:
        model.generate(input_ids=tokens(1, PROMPT), max_new_tokens=CANVAS, cache_implementation="static")


def test_copies_of_an_attached_model_are_refused(model: Any) -> None:
    """Its hooks would go along, and run on the weights of the model that was copied."""
    refusal = r"must wait until nothing is attached.*detach\(\) first"
    with SparseAttention(model, "dense") as sparse:
        for act in (copy.deepcopy, pickle.dumps):
            for what in (model, sparse):
                with pytest.raises(CallOrderError, match=refusal):
                    act(what)
        assert len(model.state_dict()) > 0
    assert torch.equal(forward(copy.deepcopy(model), MASKS["one sequence"]), forward(model, MASKS["one sequence"]))


def test_a_callback_that_raises_does_not_keep_the_model(model: Any) -> None:
    def broken(report: PassReport) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), SparseAttention(model, "dense", on_pass=broken) as sparse:
        forward(model, MASKS["one sequence"])
    assert not sparse.running and model.config._attn_implementation == "eager"
    with SparseAttention(model, "dense", on_pass=broken) as sparse:
        forward(model, MASKS["one sequence"])
        with pytest.raises(ZeroDivisionError):
            sparse.finish_block()
        assert not sparse.running and sparse.memory_bytes == 0


def test_a_module_that_holds_the_model_can_be_attached_to(model: Any) -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = other  # of transformers too, and none of ours
            self.inner = model

    other = transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
        )
    )
    reports: list[PassReport] = []
    with SparseAttention(Holder().eval(), "dense", on_pass=reports.append) as sparse:
        model.generate(input_ids=tokens(1, PROMPT), max_new_tokens=CANVAS, max_denoising_steps=2)
        assert len(reports) == 2 and not sparse.running
    assert model.config._attn_implementation == "eager" and "generate" not in vars(model)


@pytest.mark.parametrize("name", sorted(list_policies()))
def test_every_policy_runs_in_its_own_loop_or_says_why_not(model: Any, name: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2 * CANVAS, "max_denoising_steps": 3}
    if name == "flashblock":  # a canvas has no mask token, so nobody knows what is decoded
        with pytest.raises(InvalidArgumentError, match="newly_decoded"), SparseAttention(model, name):
            model.generate(input_ids=tokens(1, PROMPT), **options)
        return
    with SparseAttention(model, name, page_size=4) as sparse:
        model.generate(input_ids=tokens(1, PROMPT), **options)
        assert sparse.decoder.blocks == 2 and sparse.memory_bytes == 0
