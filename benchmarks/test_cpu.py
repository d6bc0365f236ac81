"""The PyTorch backend on a processor, beside dense attention: ``make bench``.

Every figure is a median of rounds in which the contenders take turns, so that what else the machine does
hits all of them; and nothing is timed before its result is right.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_dlm_attn import Context, PassInfo, PrefixAttention, Selection, get_backend

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE, TOKENS, LENGTH = 32, 8, 128, 64, 16, 32 << 10
ROUNDS = 15
LOSA = "losa:budget=256"
BAR = 5.0  # a pass that reads a tenth of the pages, beside the faster dense one


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


class Problem:
    """One layer: a cache that holds the block behind its context, and queries of two passes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.cache = torch.randn(2, 1, KV_HEADS, LENGTH + PAGE, HEAD_DIM)
        k, v = self.cache
        self.context = Context.from_dense(k, v, PAGE, [LENGTH])
        self.keys, self.values = (side[:, :, : LENGTH + TOKENS] for side in (k, v))
        self.block = tuple(side[:, :, LENGTH : LENGTH + TOKENS] for side in (k, v))
        self.queries = [torch.randn(1, Q_HEADS, TOKENS, HEAD_DIM) for _ in range(2)]
        self.attention = PrefixAttention(LOSA, "torch")
        _, self.memory = self.attention(self.queries[0], *self.block, self.context, None, PassInfo(0))
        # The first sparse pass builds the bounds that the others of the block find.
        _, self.memory = self.attention(self.queries[0], *self.block, self.context, self.memory, PassInfo(1))

    def losa(self) -> Any:
        return self.attention(self.queries[1], *self.block, self.context, self.memory, PassInfo(2))

    def dense_gqa(self) -> torch.Tensor:
        return scaled_dot_product_attention(self.queries[1], self.keys, self.values, enable_gqa=True)

    def dense_folded(self) -> torch.Tensor:
        rows = self.queries[1].view(1, KV_HEADS, -1, HEAD_DIM)
        return scaled_dot_product_attention(rows, self.keys, self.values).view(1, Q_HEADS, TOKENS, HEAD_DIM)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


def in_turns(**contenders: Callable[[], Any]) -> dict[str, float]:
    """Return the median seconds of each contender."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def test_a_losa_pass_beside_dense_attention(problem: Problem, benchmark: Any) -> None:
    out, memory = problem.losa()
    density = float(memory.traffic.density[0])
    assert 0.08 < density < 0.12
    # Right first: the rows that the pass recomputed, from the pages that it chose.
    one = get_backend("torch", attention="masked")
    chosen = Selection(memory.selection.mask, memory.selection.span)
    wanted, _ = one.attend(
        problem.queries[1], *problem.block, problem.context, chosen, memory.active, problem.memory.state
    )
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(problem.dense_gqa(), problem.dense_folded(), atol=1e-5, rtol=0)

    medians = in_turns(losa=problem.losa, gqa=problem.dense_gqa, folded=problem.dense_folded)
    benchmark.pedantic(problem.losa, rounds=ROUNDS, warmup_rounds=1)
    dense = min(medians["gqa"], medians["folded"])
    ratio = dense / medians["losa"]
    benchmark.extra_info.update(medians, density=density, ratio=ratio)
    print(
        f"\nPyTorch {torch.__version__}, {torch.get_num_threads()} threads; {Q_HEADS}/{KV_HEADS} heads, "
        f"head_dim {HEAD_DIM}, float32, {LENGTH} tokens, T={TOKENS}, page {PAGE}, density {density:.3f}\n"
        f"LoSA pass {medians['losa'] * 1e3:.2f} ms; dense SDPA enable_gqa {medians['gqa'] * 1e3:.2f} ms, "
        f"folded {medians['folded'] * 1e3:.2f} ms; {ratio:.1f} times faster than the faster one"
    )
    assert ratio >= BAR


def test_evaluate_beside_the_reference(benchmark: Any) -> None:
    """The small model over four prompts: the same answers, and seconds of each backend."""
    from sparse_dlm_attn_small_model.evaluate import Evaluation, evaluate

    def run(backend: str) -> list[Any]:
        torch.set_num_threads(1)
        return evaluate(
            Evaluation(
                tasks=("single-key",),
                prompts=4,
                length=4096,
                seed=0,
                policies=("losa", "quest"),
                budgets=(64, 256),
                backend=backend,
            ),
            workers=1,
        )

    answers = {}
    seconds: dict[str, list[float]] = {"reference": [], "torch": []}
    for _ in range(2):
        for name, times in seconds.items():
            started = time.perf_counter()
            samples = run(name)
            times.append(time.perf_counter() - started)
            answers[name] = [result.exact for sample in samples for result in sample.results]
    assert answers["torch"] == answers["reference"]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["reference"] / medians["torch"]
    benchmark.extra_info.update(medians, ratio=ratio)
    benchmark.pedantic(run, args=("torch",), rounds=1)
    print(
        f"\nevaluate: reference {medians['reference']:.1f} s, torch {medians['torch']:.1f} s; {ratio:.1f} times faster"
    )  # no bar: most of it is reading the prompt, the same products in both
