"""What the shipped weights can do. These tests, and only these, need trained weights."""

from __future__ import annotations

import pytest

from sparse_dlm_attn_small_model.decoding import decode_blocks, decode_full_sequence
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.retrieval import answer_blocks, make_prompt

PROMPTS = 4


@pytest.fixture(scope="module")
def trained() -> TinyModel:
    return TinyModel.load()


def test_a_key_far_back_is_found_unless_a_window_hides_it(trained: TinyModel) -> None:
    exact = dict.fromkeys(("dense", "losa:budget=64", "quest:budget=64", "sliding-window:window=64"), 0)
    for seed in range(PROMPTS):
        prompt = make_prompt("single-key", length=1024, seed=seed)
        prefix = trained.prefill(prompt.text)
        assert prompt.answer is not None
        blocks = answer_blocks(prompt.answer, 16)
        for policy in exact:
            result = decode_blocks(trained, prompt.text, policy=policy, prefix=prefix, max_blocks=blocks)
            exact[policy] += result.output.decode() == prompt.answer
    assert exact["dense"] >= PROMPTS - 1
    assert exact["losa:budget=64"] >= exact["dense"] - 1
    assert exact["sliding-window:window=64"] == 0


def test_full_sequence_decoding_finds_the_key_too(trained: TinyModel) -> None:
    prompts = [make_prompt("single-key", length=512, seed=seed) for seed in range(2)]
    found = [decode_full_sequence(trained, prompt.text, new_tokens=16).output.decode() for prompt in prompts]
    assert any(answer == prompt.answer for answer, prompt in zip(found, prompts, strict=True))
