"""What the shipped weights can do. These tests, and only these, need trained weights."""

from __future__ import annotations

import pytest

from sparse_dlm_attn_tiny import retrieval
from sparse_dlm_attn_tiny.decoding import decode_blocks, decode_full_sequence
from sparse_dlm_attn_tiny.model import TinyModel

PROMPTS = 4


@pytest.fixture(scope="module")
def trained() -> TinyModel:
    return TinyModel.load()


@pytest.fixture(scope="module")
def prompts() -> list[retrieval.RetrievalPrompt]:
    haystack = retrieval.haystack_text()
    return [
        retrieval.make_prompt("single-key", length=1024, seed=seed, haystack=haystack)
        for seed in range(PROMPTS)
    ]


@pytest.fixture(scope="module")
def exact(trained: TinyModel, prompts: list[retrieval.RetrievalPrompt]) -> dict[str, int]:
    """Prompts answered exactly, by policy, the prefill shared."""
    counts = dict.fromkeys(("dense", "losa:budget=64", "quest:budget=64", "sliding-window:window=64"), 0)
    for prompt in prompts:
        prefix = trained.prefill(prompt.text)
        blocks = retrieval.answer_blocks(prompt.answer, 16)
        for policy in counts:
            result = decode_blocks(
                trained, prompt.text, policy=policy, prefix=prefix, max_blocks=blocks
            )
            counts[policy] += retrieval.decoded_answer(result.generated) == prompt.answer
    return counts


def test_dense_decoding_finds_a_key_far_back(exact: dict[str, int]) -> None:
    assert exact["dense"] >= PROMPTS - 1


def test_losa_loses_almost_nothing_of_it(exact: dict[str, int]) -> None:
    assert exact["losa:budget=64"] >= exact["dense"] - 1 >= PROMPTS - 2


def test_a_window_of_the_same_budget_does_not_find_it(exact: dict[str, int]) -> None:
    assert exact["sliding-window:window=64"] == 0


def test_a_chained_answer_over_4096_bytes_is_exact(trained: TinyModel) -> None:
    prompt = retrieval.make_prompt(
        "chained", length=4096, seed=1, haystack=retrieval.haystack_text()
    )
    result = decode_blocks(trained, prompt.text, policy="dense", max_blocks=2)
    assert retrieval.decoded_answer(result.generated) == prompt.answer
    assert result.stopped


def test_full_sequence_decoding_finds_the_key_too(trained: TinyModel) -> None:
    haystack = retrieval.haystack_text()
    found = 0
    for seed in range(2):
        prompt = retrieval.make_prompt("single-key", length=512, seed=seed, haystack=haystack)
        result = decode_full_sequence(trained, prompt.text, new_tokens=16)
        found += retrieval.decoded_answer(result.generated) == prompt.answer
    assert found >= 1
