"""Custom operators keep what they declare, and a layer with a policy compiles as one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch backend needs PyTorch")

from torch._dynamo.testing import CompileCounter  # noqa: E402

from sparse_dlm_attn import Context, PassInfo, PrefixAttention, get_policy  # noqa: E402
from sparse_dlm_attn_torch import TorchBackend, ops  # noqa: E402


def arguments(path: str, dtype: torch.dtype) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 8, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 5, 8, dtype=dtype)
    cache = torch.randn(2, 2, 2, 24, 8, dtype=dtype)
    context = Context.from_dense(*cache, 4, [24, 11])
    pages = (context.k_pages, context.v_pages, context.page_table, context.page_lengths)
    active, lse = torch.tensor([[True, False] * 2 + [True]] * 2), torch.randn(2, 4, 5)
    chosen = (*pages, torch.rand(2, 2, 3, 6) < 0.5, 2, active, 0.25, path)
    lower, upper = ops.page_bounds(*(pages[place] for place in (0, 2, 3)))
    scores = torch.randn(2, 4, 5, 6)
    return {
        "attend_pages": (ops.attend_pages, (q, *chosen)),
        "attend_block": (ops.attend_block, (q, k, v, 0.25, "matmul")),
        "attend": (ops.attend, (q, k, v, *chosen, "matmul", torch.zeros_like(q), lse)),
        "attend, nothing cached": (ops.attend, (q, k, v, *chosen, "matmul", None, None)),
        "page_bounds": (ops.page_bounds, (pages[0], *pages[2:])),
        "page_scores": (ops.page_scores, (q, lower, upper, active)),
        "top_pages": (ops.top_pages, (scores, torch.full((), 2), scores > 0)),
        "pooled_scores": (ops.pooled_scores, (q, pages[0], *pages[2:], 2, 0.25, lse)),
    }


NAMES = tuple(arguments("gather", torch.float32))


ATTENDS = ("attend_pages", "attend")


@pytest.mark.parametrize(
    ("name", "path", "dtype"),
    [(name, "gather", torch.float32) for name in NAMES]
    + [
        (name, path, dtype)
        for name in ATTENDS
        for path, dtype in (("masked", torch.float32), ("gather", torch.bfloat16))
    ],
    ids=str,
)
def test_custom_operators_keep_what_they_declare(name: str, path: str, dtype: torch.dtype) -> None:
    operator, given = arguments(path, dtype)[name]
    torch.library.opcheck(operator.opaque, given)


@pytest.mark.parametrize(
    ("policy", "path"),
    [
        ("losa:budget=32", "gather"),
        ("losa:budget=32,mass=0.5", "masked"),
        ("sparsed:warmup=2", "gather"),
        ("flashblock:limit=2", "gather"),
    ],
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")  # array-api-compat caches a look-up
def test_a_layer_compiles_as_one_graph_whatever_the_context_s_length(
    policy: str, path: str, toy_layer: Callable[..., Any]
) -> None:
    torch._dynamo.reset()
    layer = toy_layer(policy, TorchBackend(attention=path))
    counter, counts = CompileCounter(), []
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for pages in (20, 24, 36):
        cache = torch.randn(2, 2, 2, pages * 8, 16)
        context = Context.from_dense(*cache, 8, version=pages)
        memories: list[Any] = [None, None]
        for index in range(4):
            newly = torch.rand(2, 8) < 0.2
            x, info = torch.randn(2, 8, 64), PassInfo(index, newly_decoded=newly, total_passes=4)
            out, memories[0] = compiled(x, context, memories[0], info)
            wanted, memories[1] = layer(x, context, memories[1], info)
            torch.testing.assert_close(out, wanted)
        counts.append(counter.frame_count)
    assert counts[0] <= 3  # without memory, with memory, and with any number of passes
    assert counts[1] == counts[2] <= 6  # each once more, with any length


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")  # array-api-compat caches a look-up
def test_contexts_and_pass_numbers_are_made_of_tensors_while_a_compiler_traces() -> None:
    """On a processor, whose tensors could be read at any other time."""
    torch._dynamo.reset()
    attention = PrefixAttention("quest:budget=16", "torch")
    k, v, q = torch.randn(2, 2, 32, 16), torch.randn(2, 2, 32, 16), torch.randn(2, 4, 8, 16)

    def run(lengths: torch.Tensor, index: torch.Tensor) -> Any:
        context = Context.from_dense(k, v, 8, lengths)
        return attention(q, k[:, :, :8], v[:, :, :8], context, None, PassInfo(index))[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for lengths, index in (([32, 5], [0, 3]), ([0, 17], [0, 0])):
        given = torch.tensor(lengths), torch.tensor(index)
        torch.testing.assert_close(compiled(*given), run(*given))


@pytest.mark.parametrize("policy", ["dkv-cache:reload=3", "sparse-dllm", "losa:budget=32", "sparsed:warmup=2"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")  # array-api-compat caches a look-up
def test_with_symbolic_numbers_no_length_and_no_version_compiles_anew(
    policy: str, toy_layer: Callable[..., Any]
) -> None:
    """A number that the compiler keeps symbolic decides as a plain one does, and is not made a constant."""
    torch._dynamo.reset()
    layer = toy_layer(policy, TorchBackend())
    counter, counts = CompileCounter(), []
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for pages in (20, 24, 36):
        context = Context.from_dense(*torch.randn(2, 2, 2, pages * 8, 16), 8, version=pages)
        segments = (torch.arange(pages) > 9).to(torch.int8).expand(2, -1)
        context = replace(context, page_segments=segments)
        memories: list[Any] = [None, None]
        decoded = newly = torch.zeros(2, 8, dtype=torch.bool)
        for index in range(5):
            x, info = torch.randn(2, 8, 64), PassInfo(index, index == 4, decoded, newly, total_passes=4)
            out, memories[0] = compiled(x, context, memories[0], info)
            wanted, memories[1] = layer(x, context, memories[1], info)
            torch.testing.assert_close(out, wanted)
            newly = (torch.rand(2, 8) < 0.3) & ~decoded
            decoded = decoded | newly
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == counts[2] <= 5


@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "by position"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")  # array-api-compat caches a look-up
def test_masked_neighbours_compile_as_one_graph(ordered: bool) -> None:
    torch._dynamo.reset()
    policy = get_policy("dkv-cache:mode=greedy,reload=100")
    counter, rows = CompileCounter(), torch.ones(2, 40, dtype=torch.bool)
    compiled = torch.compile(policy.computed_tokens, fullgraph=True, backend=counter)
    for _ in range(3):
        order = torch.rand(2, 40).argsort()[:, :3]
        planned = torch.zeros(2, 40, dtype=torch.bool).scatter(1, order, True)
        decoded = (torch.rand(2, 40) < 0.4) & ~planned
        info = PassInfo(3, False, decoded, decoded & False, planned=planned, planned_order=order if ordered else None)
        assert torch.equal(compiled(info, rows), policy.computed_tokens(info, rows))
    assert counter.frame_count == 1
