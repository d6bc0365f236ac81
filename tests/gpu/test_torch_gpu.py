"""The PyTorch backend on a GPU: right, without a wait for the device, captured, compiled, and in bounds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the PyTorch backend needs PyTorch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that PyTorch can use", allow_module_level=True)

from torch._dynamo.utils import counters  # noqa: E402

from sparse_dlm_attn import (  # noqa: E402
    AttentionState,
    Context,
    InvalidArgumentError,
    PassInfo,
    PrefixAttention,
    Selection,
    UnavailableError,
    UnsupportedError,
)
from sparse_dlm_attn.capabilities import Problem  # noqa: E402
from sparse_dlm_attn.policies.dense import Dense  # noqa: E402
from sparse_dlm_attn.policies.dkv_cache import DKVCache  # noqa: E402
from sparse_dlm_attn.policies.fast_dllm import FastDLLM  # noqa: E402
from sparse_dlm_attn.policies.flashblock import FlashBlock  # noqa: E402
from sparse_dlm_attn.policies.losa import Losa  # noqa: E402
from sparse_dlm_attn.policies.mage import Mage  # noqa: E402
from sparse_dlm_attn.policies.quest import Quest  # noqa: E402
from sparse_dlm_attn.policies.sliding_window import SlidingWindow  # noqa: E402
from sparse_dlm_attn.policies.snapkv import SnapKV  # noqa: E402
from sparse_dlm_attn.policies.sparse_dllm import SparseDLLM  # noqa: E402
from sparse_dlm_attn.policies.sparsed import SparseD  # noqa: E402
from sparse_dlm_attn.policies.streaming_llm import StreamingLLM  # noqa: E402
from sparse_dlm_attn_reference import ReferenceBackend  # noqa: E402
from sparse_dlm_attn_torch import TorchBackend, flex, ops  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = ("masked", "flex")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
POLICIES = {
    "dense": Dense(),
    "sliding-window": SlidingWindow(),
    "streaming-llm": StreamingLLM(),
    "quest": Quest(budget=128),
    "losa": Losa(budget=128),
    "losa by mass": Losa(budget=128, mass=0.5),
    "losa, own pages": Losa(budget=128, pages="own", drift="refresh"),
    "flashblock": FlashBlock(),
    "mage": Mage(dense_layers=0),
    "sparsed": SparseD(warmup=1),
    "sparsed by spans": SparseD(warmup=1, span=8),
    "sparse-dllm": SparseDLLM(),
    "snapkv": SnapKV(),
    "fast-dllm": FastDLLM(),
    "dkv-cache": DKVCache(),
}
BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE, TOKENS, PAGES = 2, 8, 2, 64, 16, 16, 40


@pytest.fixture(autouse=True)
def timed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print how long a test took and what it compiled: a compiler that misbehaves shows there."""
    started, before = time.perf_counter(), flex.kernel.cache_info().misses
    torch.cuda.empty_cache()
    yield
    torch.cuda.synchronize()
    forms = flex.kernel.cache_info().misses - before
    print(f"\n{request.node.name}: {time.perf_counter() - started:.1f} s, {forms} kernels", end="")


@functools.cache
def backend(attention: str = "auto") -> TorchBackend:
    return TorchBackend(device="cuda", attention=attention)


def block(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [
        torch.randn(BATCH, heads, TOKENS, HEAD_DIM, device="cuda", dtype=dtype)
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
    ]


def cache_of(dtype: torch.dtype, pages: int = PAGES, seed: int = 1) -> torch.Tensor:
    """Return K and V; what lies behind a sequence's length is NaN, and must not matter."""
    torch.manual_seed(seed)
    cache = torch.randn(2, BATCH, KV_HEADS, pages * PAGE, HEAD_DIM, device="cuda", dtype=dtype)
    for sequence, length in enumerate(lengths_of(pages)):
        cache[:, sequence, :, length:] = torch.nan
    return cache


def lengths_of(pages: int) -> tuple[int, int]:
    return pages * PAGE - 5, (pages - 3) * PAGE


def context_of(dtype: torch.dtype, pages: int = PAGES, version: int = 0) -> Context:
    k, v = cache_of(dtype, pages)
    return Context.from_dense(k, v, PAGE, torch.tensor(lengths_of(pages), device="cuda"), version=version)


def on_host(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().to(torch.float64 if tensor.is_floating_point() else tensor.dtype).numpy()


def host_context(context: Context) -> Context:
    names = ("k_pages", "v_pages", "page_table", "page_lengths")
    return Context(*(on_host(getattr(context, name)) for name in names))


def close(got: AttentionState, wanted: AttentionState, dtype: torch.dtype) -> None:
    np.testing.assert_array_equal(np.isneginf(on_host(got.lse)), np.isneginf(wanted.lse))
    np.testing.assert_allclose(on_host(got.out), wanted.out, atol=TOLERANCE[dtype], rtol=0)
    finite = ~np.isneginf(wanted.lse)
    np.testing.assert_allclose(on_host(got.lse)[finite], wanted.lse[finite], atol=1e-4, rtol=0)


@pytest.mark.parametrize("span", [TOKENS, 5])
@pytest.mark.parametrize("heads", [1, KV_HEADS, Q_HEADS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_computes_what_the_reference_computes(path: str, dtype: torch.dtype, heads: int, span: int) -> None:
    (q, k, v), context = block(dtype), context_of(dtype)
    chosen = torch.rand(BATCH, heads, -(-TOKENS // span), PAGES, device="cuda") < 0.4
    active = torch.rand(BATCH, TOKENS, device="cuda") < 0.7
    got = backend(path).attend_pages(q, context, Selection(chosen, span), active)
    host = [on_host(tensor) for tensor in (q, k, v, chosen, active)]
    reference, selection = ReferenceBackend(), Selection(host[3], span)
    close(got, reference.attend_pages(host[0], host_context(context), selection, host[4]), dtype)
    out, state = backend(path).attend(q, k, v, context, Selection(chosen, span), active, None)
    wanted, _ = reference.attend(*host[:3], host_context(context), selection, host[4], None)
    np.testing.assert_allclose(on_host(out), wanted, atol=TOLERANCE[dtype], rtol=0)
    assert torch.equal(state.out, got.out)
    assert torch.equal(state.lse, got.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_pages_are_chosen_by_is_what_the_reference_chooses_by(dtype: torch.dtype) -> None:
    (q, _, _), context = block(dtype), context_of(dtype)
    gpu, reference, host = backend(), ReferenceBackend(), host_context(context)
    bounds, wanted = gpu.page_bounds(context), reference.page_bounds(host)
    np.testing.assert_array_equal(on_host(bounds.lower), wanted.lower)
    np.testing.assert_array_equal(on_host(bounds.upper), wanted.upper)
    scores = gpu.page_scores(q, bounds)
    of_reference = reference.page_scores(on_host(q), wanted)
    np.testing.assert_allclose(on_host(scores), of_reference, rtol=1e-4, atol=1e-3)
    eligible = context.exists[:, None, None, :]
    mask = gpu.top_pages(scores, 7, eligible=eligible)
    wanted_mask = reference.top_pages(on_host(scores), 7, eligible=on_host(eligible))
    np.testing.assert_array_equal(on_host(mask), wanted_mask)
    mass = gpu.pooled_scores(q, context, span=8)
    np.testing.assert_allclose(on_host(mass), reference.pooled_scores(on_host(q), host, span=8), rtol=1e-4, atol=1e-6)


def test_auto_takes_flexattention_where_it_can_and_says_so() -> None:
    (q, _, _), context = block(torch.bfloat16), context_of(torch.bfloat16)
    assert backend().path_for(Problem.of(q, context)) == "flex"
    assert backend().path_for(Problem("float64", 64, 16, 8, 2, 16, "cuda")) == "masked"
    assert "attention=flex where it can, else masked" in backend().capabilities.notes


def test_a_layout_that_flexattention_cannot_read_is_computed_by_masked() -> None:
    (q, _, _), context = block(torch.float32), context_of(torch.float32)
    by_token = Context(
        *(getattr(context, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("k_pages", "v_pages")),
        context.page_table,
        context.page_lengths,
    )
    selection = Selection.all_pages(context, TOKENS)
    active = torch.ones(BATCH, TOKENS, dtype=torch.bool, device="cuda")
    state = backend().attend_pages(q, by_token, selection, active)
    wanted = backend("masked").attend_pages(q, context, selection, active)
    torch.testing.assert_close(state.out, wanted.out, atol=2e-5, rtol=0)


def run_block(
    policy: Any, queries: list[torch.Tensor], context: Context, rest: list[torch.Tensor], path: str = "auto"
) -> list[torch.Tensor]:
    """Run a block of passes and return every output."""
    attention, memory, outs = PrefixAttention(policy, backend(path)), None, []
    decoded = torch.zeros(BATCH, TOKENS, dtype=torch.bool, device="cuda")
    for index, q in enumerate(queries):
        newly = torch.zeros_like(decoded)
        newly[:, 2 * index : 2 * index + 2] = True
        info = PassInfo(index, decoded=decoded, newly_decoded=newly, total_passes=len(queries))
        out, memory = attention(q, *rest, context, memory, info)
        decoded = decoded | newly
        outs.append(out)
    return outs


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("policy", ["dense", "losa", "sparsed"])
def test_no_setting_of_the_process_changes_a_pass(policy: str, path: str) -> None:
    context, (q, *rest) = context_of(torch.bfloat16), block(torch.bfloat16)
    wanted = run_block(POLICIES[policy], [q, q + 1], context, rest, path)
    with torch.autocast("cuda", dtype=torch.float16):
        got = [run_block(POLICIES[policy], [q, q + 1], context, rest, path)]
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.float64)
    try:
        got.append(run_block(POLICIES[policy], [q, q + 1], context, rest, path))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, [*got[0], *got[1]], [*wanted, *wanted]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_pass_waits_for_the_device(policy: str, path: str) -> None:
    context = context_of(torch.bfloat16)
    rows = [block(torch.bfloat16, seed) for seed in range(3)]
    queries, rest = [row[0] for row in rows], rows[0][1:]
    first = run_block(POLICIES[policy], queries, context, rest, path)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run_block(POLICIES[policy], queries, context, rest, path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("policy", ["losa", "losa by mass", "sparsed", "quest", "mage"])
def test_a_block_is_captured_in_a_graph_and_replayed_on_other_inputs(policy: str, path: str) -> None:
    cache = cache_of(torch.bfloat16)
    lengths = torch.tensor(lengths_of(PAGES), device="cuda")
    context = Context.from_dense(*cache, PAGE, lengths)
    rows = [block(torch.bfloat16, seed) for seed in range(3)]
    queries, rest = [row[0] for row in rows], rows[0][1:]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run_block(POLICIES[policy], queries, context, rest, path)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_block(POLICIES[policy], queries, context, rest, path)
    for seed in (10, 20):
        for place, q in enumerate(queries):
            q.copy_(block(torch.bfloat16, seed + place)[0])
        cache.copy_(cache_of(torch.bfloat16, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        eager = run_block(POLICIES[policy], queries, context, rest, path)
        for one, wanted in zip(captured, eager, strict=True):
            torch.testing.assert_close(one, wanted, atol=1e-2, rtol=0)


def test_two_hundred_passes_compile_nothing_new() -> None:
    """With other selections, numbers of passes and lengths, as long as pages stay within a power of two."""
    policy = Losa(budget=128)
    attention = PrefixAttention(policy, backend("flex"))

    def one_block(pages: int, passes: int) -> None:
        memory, context = None, context_of(torch.bfloat16, pages, version=pages)
        for index in range(passes):
            q, k, v = block(torch.bfloat16, seed=index)
            out, memory = attention(q, k, v, context, memory, PassInfo(index))
        assert out.isfinite().all()

    one_block(40, 2)
    forms, graphs = flex.kernel.cache_info().misses, counters["stats"]["unique_graphs"]
    assert forms >= 1
    assert graphs >= 1
    done = 0
    while done < 200:
        passes = 1 + done % 7
        one_block(33 + done % 32, passes)
        done += passes
    assert flex.kernel.cache_info().misses == forms
    assert counters["stats"]["unique_graphs"] == graphs


def peak_of(call: Callable[[], Any]) -> int:
    """Return the most bytes that a call holds beside what was there, its results included."""
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    return peak


@pytest.mark.parametrize("path", PATHS)
def test_extra_memory_follows_the_selected_pages_not_the_context(path: str) -> None:
    """One eighth of a million tokens more may cost index arithmetic, a thousandth of their K and V."""
    heads, kv_heads, head_dim, page = 32, 8, 128, 64
    peaks, sizes = [], []
    for tokens in (32 << 10, 160 << 10):
        torch.manual_seed(0)
        k = torch.randn(1, kv_heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
        context = Context.from_dense(k, k.clone(), page)
        q = torch.randn(1, heads, 16, head_dim, device="cuda", dtype=torch.bfloat16)
        mask = torch.zeros(1, kv_heads, 1, tokens // page, dtype=torch.bool, device="cuda")
        mask[..., :: tokens // page // 32] = True  # 32 pages, whatever the context
        active = torch.ones(1, 16, dtype=torch.bool, device="cuda")
        selection = Selection(mask, 16)
        peaks.append(peak_of(functools.partial(backend(path).attend_pages, q, context, selection, active)))
        sizes.append(2 * k.numel() * k.element_size())
        selected = 2 * 32 * page * kv_heads * head_dim * k.element_size()
        del k, context
    print(f"\n{path}: extra {peaks} bytes, context {sizes}, selected pages {selected}", end="")
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) * (0.01 if path == "flex" else 0.2)
    assert peaks[1] < selected + (192 << 20)


def arguments(path: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    (q, k, v), context = block(torch.bfloat16), context_of(torch.bfloat16)
    pages = (context.k_pages, context.v_pages, context.page_table, context.page_lengths)
    mask = torch.rand(BATCH, KV_HEADS, 2, PAGES, device="cuda") < 0.4
    active = torch.rand(BATCH, TOKENS, device="cuda") < 0.7
    lower, upper = ops.page_bounds(*(pages[place] for place in (0, 2, 3)))
    scores = torch.randn(BATCH, Q_HEADS, TOKENS, PAGES, device="cuda")
    lse = torch.randn(BATCH, Q_HEADS, TOKENS, device="cuda")
    count = torch.full((), 5, device="cuda")
    chosen = (*pages, mask, 8, active, 0.125, path)
    return {
        "attend_pages": (ops.attend_pages, (q, *chosen)),
        "attend_block": (ops.attend_block, (q, k, v, 0.125, "matmul")),
        "attend": (ops.attend, (q, k, v, *chosen, "matmul", torch.zeros_like(q), lse)),
        "page_bounds": (ops.page_bounds, (pages[0], *pages[2:])),
        "page_scores": (ops.page_scores, (q, lower, upper, active)),
        "top_pages": (ops.top_pages, (scores, count, scores > 0)),
        "pooled_scores": (ops.pooled_scores, (q, pages[0], *pages[2:], 8, 0.125, lse)),
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name", ["attend_pages", "attend_block", "attend", "page_bounds", "page_scores", "top_pages", "pooled_scores"]
)
def test_custom_operators_keep_what_they_declare(name: str, path: str) -> None:
    operator, given = arguments(path)[name]
    torch.library.opcheck(operator.opaque, given)


@pytest.mark.parametrize("policy", ["losa", "sparsed", "mage"])
def test_a_layer_compiles_as_one_graph(policy: str, toy_layer: Callable[..., Any]) -> None:
    layer = toy_layer(
        POLICIES[policy], backend("flex"), dim=128, heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM
    ).to(device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    flex.kernel.cache_clear()
    compiled, graphs = torch.compile(layer, fullgraph=True), []
    for pages in (40, 48, 56, 60):
        context, memories = context_of(torch.bfloat16, pages, version=pages), [None, None]
        for index in range(3):
            torch.manual_seed(index)
            x = torch.randn(BATCH, TOKENS, 128, device="cuda", dtype=torch.bfloat16)
            outs = []
            for place, call in enumerate((compiled, layer)):
                out, memories[place] = call(x, context, memories[place], PassInfo(index, total_passes=3))
                outs.append(out)
            # Projections are fused differently, so a row or a page may be chosen that was not.
            assert (outs[0] - outs[1]).abs().median() < 2e-2
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[-2], f"a longer context was compiled anew: {graphs}"


def test_flash_attn_computes_the_block_where_it_is_installed() -> None:
    (q, k, v) = block(torch.bfloat16)
    try:
        flash = TorchBackend(device="cuda", dense="flash")
    except UnavailableError as error:
        pytest.skip(f"no flash-attn here: {error}")
    wanted = ReferenceBackend().attend_block(*map(on_host, (q, k, v)))
    close(flash.attend_block(q, k, v), wanted, torch.bfloat16)


def test_bad_places_are_refused_with_the_remedy() -> None:
    rows, context = block(torch.float32), context_of(torch.float32)
    host = Context(*(getattr(context, name).cpu() for name in ("k_pages", "v_pages", "page_table", "page_lengths")))
    with pytest.raises(UnsupportedError, match="move the tensors to 'cuda'"):
        PrefixAttention(Dense(), backend())(*(row.cpu() for row in rows), host)
    with pytest.raises(InvalidArgumentError, match="Tensor on device cuda:0"):
        PrefixAttention(Dense(), backend())(*rows, host)
    with pytest.raises(InvalidArgumentError, match=r"Move it: tensor\.to\('cuda'\)"):
        backend().attend_block(*(row.cpu() for row in rows))
    with pytest.raises(UnsupportedError, match="attention='flex' or 'masked'"):
        TorchBackend(device="cuda", attention="gather")
    with pytest.raises(InvalidArgumentError, match="must name one of"):
        TorchBackend(device=f"cuda:{torch.cuda.device_count()}")
