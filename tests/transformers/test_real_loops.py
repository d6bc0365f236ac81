"""Loops that people run, written from the methods' descriptions: the model's own attention, then ours in its place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import module_stand_ins as stand_ins
import pytest
import torch
from transformers import DynamicCache

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn_transformers import PassReport, SparseAttention

BLOCK, MASK_ID = 8, 63


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model.eval()


def prompt(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, MASK_ID, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def unmask_best(x: torch.Tensor, logits: torch.Tensor, masked: torch.Tensor, count: int) -> None:
    """Put the most confident predictions in the place of masks, in each row."""
    logits = logits.clone()
    logits[..., MASK_ID] = -torch.inf
    confidence, token = logits.softmax(-1).max(-1)
    confidence = confidence.masked_fill(~masked, -1.0)
    for row in range(len(x)):
        chosen = confidence[row].topk(min(count, int(masked[row].sum()))).indices
        x[row, chosen] = token[row, chosen]


def staircase(length: int, form: str) -> torch.Tensor:
    """Every token sees its own block and the blocks before; of three axes, as SDAR's script makes it."""
    blocks = torch.arange(length) // BLOCK
    seen = (blocks[:, None] >= blocks[None, :])[None]
    return {"numbers": seen.float(), "bool": seen, "four axes": seen[:, None]}[form]


def sdar_loop(model: Any, sparse: Any, *, form: str = "numbers") -> list[torch.Tensor]:
    """SDAR and TraDo: a prefix cache, a pass that stores when no mask is left; nobody says where blocks begin."""
    ids, blocks, seen = prompt(21), 4, []
    x = torch.full((1, blocks * BLOCK), MASK_ID)
    x[:, : ids.shape[1]] = ids
    mask, positions = staircase(x.shape[1], form), torch.arange(x.shape[1])[None]
    cache, start = DynamicCache(), ids.shape[1] // BLOCK * BLOCK

    def run(begin: int, end: int, store: bool) -> torch.Tensor:
        rows: Any = (Ellipsis, slice(begin, end), slice(0, end))
        out = model(
            x[:, begin:end],
            attention_mask=mask[rows],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            use_cache=True,
            store_kv=store,
        )
        logits: torch.Tensor = out.logits
        return logits

    run(0, start, True)
    for begin in range(start, x.shape[1], BLOCK):
        end = begin + BLOCK
        while (masked := x[:, begin:end] == MASK_ID).any():
            seen.append(run(begin, end, False))
            unmask_best(x[:, begin:end], seen[-1], masked, 3)
        run(begin, end, True)
        assert cache.get_seq_length() == end
    return seen


def fast_dllm_loop(model: Any, sparse: Any, *, block_cache: bool) -> list[torch.Tensor]:
    """Fast-dLLM v2: sub-blocks from left to right, predictions shifted by one, a cache of the block's own rows."""
    x, seen, small = prompt(2 * BLOCK + 3, 2), [], BLOCK // 2
    whole = x.shape[1] // BLOCK * BLOCK
    cache = model(x[:, :whole], update_past_key_values=True, use_cache=True).past_key_values

    def shifted(logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)

    for _ in range(2):
        missing = BLOCK - x.shape[1] % BLOCK
        x = torch.cat([x, torch.full((2, missing), MASK_ID)], dim=1)
        block, held = x[:, -BLOCK:], None
        for first in range(0, BLOCK, small):
            rows = slice(first, first + small)
            while (masked := block[:, rows] == MASK_ID).any():
                options: dict[str, Any] = {"past_key_values": cache, "update_past_key_values": False}
                if block_cache and held is not None and not (block[:, first] == MASK_ID).any():
                    out = model(
                        block[:, rows],
                        use_block_cache=True,
                        block_past_key_values=held,
                        replace_position=first,
                        **options,
                    )
                    logits = shifted(out.logits)
                else:
                    out = model(block, use_block_cache=block_cache, **options)
                    held = out.block_past_key_values
                    logits = shifted(out.logits)[:, rows]
                seen.append(out.logits)
                unmask_best(block[:, rows], logits, masked, 1)
        out = model(block, past_key_values=cache, update_past_key_values=True)
        x = torch.cat([x, out.logits[:, -1:].argmax(-1)], dim=1)
    return seen


def whole_sequences(model: Any, sparse: Any, mask_of: Callable[[torch.Tensor], Any]) -> list[torch.Tensor]:
    """LLaDA and Dream: every pass over all tokens of prompts padded on the left; windows filled one by one."""
    lengths, new = (13, 9), 8
    width = max(lengths)
    exists = torch.stack([torch.arange(width + new) >= width - length for length in lengths])
    x = torch.full(exists.shape, MASK_ID)
    for row, length in enumerate(lengths):
        x[row, width - length : width] = prompt(length)[0]
    seen = []
    with sparse.block(total_passes=4) if sparse is not None else nullcontext():
        for window in (slice(width, width + 4), slice(width + 4, width + 8)):
            while (masked := x[:, window] == MASK_ID).any():
                logits = model(x, attention_mask=mask_of(exists)).logits
                seen.append(logits[exists])  # rows of padding mean nothing
                unmask_best(x[:, window], logits[:, window], masked, 2)
    return seen


def both_ways(exists: torch.Tensor) -> torch.Tensor:
    """Dream's mask: tokens that exist see each other, and padding sees nothing."""
    return (exists[:, None, :, None] & exists[:, None, None, :]) if not exists.all() else "full"  # type: ignore[return-value]


def additive(exists: torch.Tensor) -> torch.Tensor:
    return torch.zeros(exists.shape).masked_fill(~exists, torch.finfo(torch.float32).min)[:, None, None]


LOOPS: dict[str, tuple[Callable[[], Any], Callable[..., list[torch.Tensor]], dict[str, Any]]] = {
    **{
        f"SDAR, mask of {form}": (lambda: stand_ins.CausalLM(stand_ins.SDARAttention), sdar_loop, {"form": form})
        for form in ("numbers", "bool", "four axes")
    },
    "Fast-dLLM v2": (stand_ins.FastDLLM, fast_dllm_loop, {"block_cache": False}),
    "Fast-dLLM v2, block cache": (stand_ins.FastDLLM, fast_dllm_loop, {"block_cache": True}),
    "LLaDA": (stand_ins.LLaDAModelLM, whole_sequences, {"mask_of": lambda exists: exists.long()}),
    "Dream": (lambda: stand_ins.CausalLM(stand_ins.DreamAttention), whole_sequences, {"mask_of": both_ways}),
    "LLaDA-MoE": (lambda: stand_ins.CausalLM(stand_ins.LLaDAMoEAttention), whole_sequences, {"mask_of": additive}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_gets_the_logits_of_the_models_own_attention_and_reads_less_if_told_to(name: str) -> None:
    make, loop, options = LOOPS[name]
    model = randomised(make())
    reports: list[PassReport] = []
    read: list[PassReport] = []
    with torch.no_grad():
        own = loop(model, None, **options)
        with SparseAttention(model, "dense", page_size=4) as sparse:
            dense = loop(model, sparse, **options)
        with SparseAttention(model, "quest:budget=4096", page_size=4, on_pass=reports.append) as sparse:
            quest = loop(model, sparse, **options)
            assert sparse.memory_bytes == 0
        with SparseAttention(model, "losa:budget=4,active=2", page_size=4, on_pass=read.append) as sparse:
            loop(model, sparse, **options)
    assert len(own) == len(dense) == len(quest) > 3
    for expected, ours, whole in zip(own, dense, quest, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        assert torch.equal(whole, ours)
    assert {report.density for report in reports} == {1.0}
    firsts, others = ([one.density for one in read if (one.index == 0) == first] for first in (True, False))
    assert set(firsts) == {1.0} and max(others) < 1.0


def test_blocks_are_found_in_a_loop_that_does_not_tell_them() -> None:
    model = randomised(stand_ins.CausalLM(stand_ins.SDARAttention))
    reports: list[PassReport] = []
    with torch.no_grad(), SparseAttention(model, "dense", on_pass=reports.append) as sparse:
        sdar_loop(model, sparse)
        sdar_loop(model, sparse)  # another prompt
    # 21 tokens: the first block holds five of the prompt and takes one pass, the other three each; then it is saved.
    one = [(0, False), (1, True), (0, False), (1, False), (2, False), (3, True)]
    assert [(report.index, report.is_save) for report in reports] == one * 2


def test_a_loop_that_gives_a_block_up_begins_the_next_one_afresh() -> None:
    model = randomised(stand_ins.CausalLM(stand_ins.SDARAttention))
    x = prompt(2 * BLOCK)
    with torch.no_grad(), SparseAttention(model, "dense", page_size=4) as sparse:
        logits = []
        for _ in range(2):
            cache = DynamicCache()
            model(x[:, :BLOCK], past_key_values=cache, store_kv=True)
            logits.append(model(x[:, BLOCK:], past_key_values=cache, store_kv=False).logits)
        assert torch.equal(*logits) and sparse.decoder.blocks == 2
        with sparse.block():  # which the loop's own caller says
            again = model(x[:, BLOCK:], past_key_values=cache).logits
        assert torch.equal(again, logits[0]) and sparse.decoder.blocks == 3


def test_rows_of_several_blocks_of_the_model_in_one_pass_are_refused() -> None:
    model, x = randomised(stand_ins.FastDLLM()), prompt(3 * BLOCK)
    with torch.no_grad(), SparseAttention(model, "dense") as sparse:
        cache = model(x[:, :BLOCK], update_past_key_values=True).past_key_values
        refusal = pytest.raises(InvalidArgumentError, match=r"whole block to each.*rows of one block of the model")
        with sparse.block(), refusal:
            model(x[:, BLOCK:], past_key_values=cache)


@pytest.mark.parametrize("causal", [True, False, None])
def test_what_would_change_scores_is_not_swallowed(causal: bool | None) -> None:
    model, x = randomised(stand_ins.CausalLM(stand_ins.DreamAttention)), prompt(16)
    with torch.no_grad():
        own = model(x, is_causal=bool(causal)).logits
        with SparseAttention(model, "dense") as sparse, sparse.block():
            if causal:
                with pytest.raises(InvalidArgumentError, match=r"is_causal must be None or False.*got True"):
                    model(x, is_causal=causal)
                return
            torch.testing.assert_close(model(x, is_causal=causal).logits, own, rtol=0, atol=1e-4)


def test_llada2_over_a_cache_gets_the_logits_of_its_own_attention() -> None:
    model, x = randomised(stand_ins.CausalLM(stand_ins.LLaDA2MoeAttention)), prompt(3 * BLOCK)
    mask = staircase(3 * BLOCK, "four axes")
    hidden = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        own = model(x, attention_mask=hidden).logits
        with SparseAttention(model, "dense", page_size=4) as sparse:
            cache = DynamicCache()
            model(x[:, :BLOCK], attention_mask=hidden[..., :BLOCK, :BLOCK], past_key_values=cache)
            for start in (BLOCK, 2 * BLOCK):
                rows = hidden[..., start : start + BLOCK, : start + BLOCK]
                with sparse.block():
                    for is_save in (False, True):
                        sparse.next_pass(is_save=is_save)
                        part = x[:, start : start + BLOCK]
                        logits = model(part, attention_mask=rows, past_key_values=cache).logits
                        expected = own[:, start : start + BLOCK]
                        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
