"""Several prompts decoded side by side: the same text and the same reads as one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import Backend, InvalidArgumentError, PassInfo, PrefixAttention
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn_tiny.cache import PrefixCache
from sparse_dlm_attn_tiny.config import MASK_ID, TinyConfig
from sparse_dlm_attn_tiny.decoding import decode_blocks, decode_together
from sparse_dlm_attn_tiny.evaluate import Evaluation, evaluate
from sparse_dlm_attn_tiny.model import TinyModel

POLICIES = ["dense", "losa:budget=16", "quest:budget=16", "flashblock", "mage:budget=16", "sparsed",
            "streaming-llm:sinks=8,window=16"]


@pytest.fixture(scope="module")
def prompts(text: bytes) -> list[bytes]:
    return [text[start : start + 77] for start in (0, 100, 200)]


def joined(model: TinyModel, prompts: list[bytes], page_size: int = 8) -> PrefixCache:
    return PrefixCache.together([model.prefill(prompt, page_size=page_size) for prompt in prompts])


@pytest.mark.parametrize("policy", POLICIES)
def test_together_or_one_by_one_makes_no_difference(
    model: TinyModel, prompts: list[bytes], policy: str
) -> None:
    prefix = joined(model, prompts)
    together = decode_together(
        model, prompts, policy=policy, prefix=prefix, steps=4, max_blocks=[1, 3, 2]
    )
    for prompt, blocks, got in zip(prompts, [1, 3, 2], together, strict=True):
        alone = decode_blocks(model, prompt, policy=policy, steps=4, max_blocks=blocks, page_size=8)
        assert (got.output, got.generated, got.stopped) == (alone.output, alone.generated, alone.stopped)
        assert (got.prompt_tokens, got.prefilled_tokens) == (77, 64)
        assert len(got.passes) == len(alone.passes)
        for ours, theirs in zip(got.passes, alone.passes, strict=True):
            assert (ours.block, ours.index, ours.is_save) == (theirs.block, theirs.index, theirs.is_save)
            assert (ours.tokens, ours.newly_decoded) == (theirs.tokens, theirs.newly_decoded)
            np.testing.assert_array_equal(ours.loaded, theirs.loaded)
            np.testing.assert_array_equal(ours.active_rows, theirs.active_rows)
        assert got.traffic() == alone.traffic()
        assert got.traffic(first_pass=False) == alone.traffic(first_pass=False)
    assert (prefix.length, prefix.batch) == (64, 3)


def test_on_other_array_libraries_too(
    small_config: TinyConfig, small_weights: dict[str, np.ndarray], library_backend: Backend,
    prompts: list[bytes],
) -> None:
    model = TinyModel(small_config, small_weights, library_backend)
    cache, attention = joined(model, prompts), PrefixAttention("quest:budget=16", library_backend)
    blocks = [[*prompt[64:77], MASK_ID, MASK_ID, MASK_ID] for prompt in prompts]
    both = model.forward_block(blocks, 64, cache.contexts(), attention, PassInfo(0))
    for place, (prompt, block) in enumerate(zip(prompts, blocks, strict=True)):
        contexts = model.prefill(prompt, page_size=8).contexts()
        alone = model.forward_block([block], 64, contexts, attention, PassInfo(0))
        np.testing.assert_allclose(to_numpy(both.logits)[place], to_numpy(alone.logits)[0], atol=1e-4)


@pytest.mark.clause("CONTEXT-1", "BOUNDS-1")
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_a_joint_cache_holds_every_sequence_and_forks_like_any_other(
    model: TinyModel, prompts: list[bytes], page_size: int
) -> None:
    joint = joined(model, prompts, 16).fork(page_size=page_size)
    assert joint.tokens == tuple(tuple(prompt[:64]) for prompt in prompts)
    for place, prompt in enumerate(prompts):
        single = model.prefill(prompt, page_size=page_size)
        for layer in range(model.config.layers):
            ours, theirs = joint.context(layer), single.context(layer)
            ours.check_contents()
            np.testing.assert_array_equal(ours.page_lengths[place], theirs.page_lengths[0])
            np.testing.assert_array_equal(
                ours.k_pages[ours.page_table[place, 0]], theirs.k_pages[theirs.page_table[0, 0]]
            )
            np.testing.assert_array_equal(joint.read(layer, 64)[1][place], single.read(layer, 64)[1][0])
            assert ours.bounds is not None and theirs.bounds is not None
            np.testing.assert_array_equal(ours.bounds.upper[place], theirs.bounds.upper[0])


@pytest.mark.clause("ERROR-1")
def test_prompts_that_cannot_be_joined_are_refused(model: TinyModel, prompts: list[bytes]) -> None:
    short = model.prefill(prompts[0][:40])
    with pytest.raises(InvalidArgumentError, match=r"same length.*equal length"):
        PrefixCache.together([model.prefill(prompts[0]), short])
    with pytest.raises(InvalidArgumentError, match="at least one"):
        PrefixCache.together([])
    prefix = joined(model, prompts)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"policy": "dkv-cache"}, "must compute all rows.*one by one"), ({"max_blocks": [1]}, "max_blocks"),
        ({"max_blocks": [1, 0, 1]}, "max_blocks"), ({"prefix": short}, "prefix"),
    ]
    for options, message in bad:
        given = {"policy": "dense", "prefix": prefix, "max_blocks": [1, 1, 1], **options}
        with pytest.raises(InvalidArgumentError, match=message):
            decode_together(model, prompts, **given)
    assert prefix.length == 64
    with pytest.raises(InvalidArgumentError, match="tokens must hold equally many"):
        prefix.append([], [], [[1], [2, 3], [4]])


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_evaluate_gives_the_same_samples_however_many_prompts_go_together(threshold: float | None) -> None:
    from sparse_dlm_attn_tiny.comparison import DecodeSettings

    steps = 2 if threshold is None else None
    evaluation = Evaluation(
        ("single-key", "chained"), 2, 512, 0, ("losa", "dkv-cache"), (64,),
        DecodeSettings(steps=steps, threshold=threshold),
    )
    ones, threes = evaluate(evaluation, together=1), evaluate(evaluation, together=3)
    assert [(each.task, each.seed) for each in threes] == evaluation.jobs()
    for one, three in zip(ones, threes, strict=True):
        for alone, joint in zip(one.results, three.results, strict=True):
            assert alone.output == joint.output
            # Products of other shapes round otherwise, which may turn the choice of a page.
            assert joint.everything.bytes_read == pytest.approx(alone.everything.bytes_read, rel=0.01)
    with pytest.raises(InvalidArgumentError, match="together"):
        evaluate(evaluation, together=0)
