"""What the shipped weights can do. These tests, and only these, need trained weights."""

from __future__ import annotations

import pytest

from sparse_dlm_attn_tiny.decoding import decode_blocks, decode_full_sequence
from sparse_dlm_attn_tiny.model import TinyModel
from sparse_dlm_attn_tiny.retrieval import answer_blocks, make_prompt

PROMPTS = 4


@pytest.fixture(scope="module")
def trained() -> TinyModel:
    return TinyModel.load()


@pytest.fixture(scope="module")
def exact(trained: TinyModel) -> dict[str, int]:
    """Prompts answered exactly, by policy, the prefill shared."""
    counts = dict.fromkeys(("dense", "losa:budget=64", "quest:budget=64", "sliding-window:window=64"), 0)
    for seed in range(PROMPTS):
        prompt = make_prompt("single-key", length=1024, seed=seed)
        prefix = trained.prefill(prompt.text)
        assert prompt.answer is not None
        blocks = answer_blocks(prompt.answer, 16)
        for policy in counts:
            result = decode_blocks(trained, prompt.text, policy=policy, prefix=prefix, max_blocks=blocks)
            counts[policy] += result.output.decode() == prompt.answer
    return counts


def test_dense_decoding_finds_a_key_far_back(exact: dict[str, int]) -> None:
    assert exact["dense"] >= PROMPTS - 1


def test_losa_loses_almost_nothing_of_it(exact: dict[str, int]) -> None:
    assert exact["losa:budget=64"] >= exact["dense"] - 1 >= PROMPTS - 2


def test_a_window_of_the_same_budget_does_not_find_it(exact: dict[str, int]) -> None:
    assert exact["sliding-window:window=64"] == 0


def test_full_sequence_decoding_finds_the_key_too(trained: TinyModel) -> None:
    found = 0
    for seed in range(2):
        prompt = make_prompt("single-key", length=512, seed=seed)
        result = decode_full_sequence(trained, prompt.text, new_tokens=16)
        found += result.output.decode() == prompt.answer
    assert found >= 1
