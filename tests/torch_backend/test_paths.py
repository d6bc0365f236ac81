"""Attention paths: they agree, say which of them ran, compile rarely and hold no more than they read."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch backend needs PyTorch")

from sparse_dlm_attn import Context, Selection, UnsupportedError, get_backend  # noqa: E402
from sparse_dlm_attn.capabilities import Problem  # noqa: E402
from sparse_dlm_attn_torch import flex, gather, masked  # noqa: E402


def inputs(
    heads: int, span: int, *, pages: int = 9, page_size: int = 16, head_dim: int = 16, seed: int = 0
) -> tuple[Any, ...]:
    """Return the arguments of a path: two sequences, of which one ends in a partial page."""
    torch.manual_seed(seed)
    k, v = torch.randn(2, 2, 2, pages * page_size, head_dim)
    context = Context.from_dense(k, v, page_size, [pages * page_size - 5, (pages - 3) * page_size])
    q = torch.randn(2, 6, 5, head_dim)
    mask = torch.rand(2, heads, -(-5 // span), pages) < 0.5
    active = torch.rand(2, 5) < 0.7
    return (q, context.k_pages, context.v_pages, context.page_table, context.page_lengths, mask, span, active, 0.25)


@pytest.mark.clause("ATTEND-1", "ATTEND-2", "GQA-1")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("span", [1, 2, 5])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_all_paths_compute_the_same(heads: int, span: int) -> None:
    given = inputs(heads, span)
    out, lse = gather.attend_pages(*given)
    for other in (masked.attend_pages(*given), flex.attend_pages(*given, compiled=False)):
        torch.testing.assert_close(other[0], out, atol=1e-5, rtol=0)
        torch.testing.assert_close(other[1], lse, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_more_partial_pages_than_flexattention_takes_show_as_nan() -> None:
    pages = flex.PARTIAL_PAGES + 1
    given = list(inputs(2, 5, pages=pages))
    given[4] = torch.full((2, pages), 7, dtype=torch.int32)
    given[4][1, 0] = 16  # one partial page fewer, which is just not too many
    given[5], given[7] = torch.ones_like(given[5]), torch.ones_like(given[7])
    out, _ = flex.attend_pages(*given, compiled=False)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], gather.attend_pages(*given)[0][1], atol=1e-5, rtol=0)


def test_the_kernel_is_compiled_once_for_all_lengths_of_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def compiler(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(flex, "compiler", compiler)
    for pages in (3, 9, 20, 41, 59):  # selection, length and capacity differ from call to call
        flex.attend_pages(*inputs(2, 5, pages=pages, seed=pages))
    assert len(graphs) == 1
    flex.attend_pages(*inputs(2, 5, pages=65))  # the next bucket
    assert len(graphs) == 2
    for page_size in range(16, 16 * 12, 16):  # more forms than PyTorch compiles of one function
        flex.attend_pages(*inputs(2, 5, page_size=page_size))
    assert len(graphs) == 12


def test_the_path_of_a_problem_is_told() -> None:
    problem = Problem("float32", 64, 16, 8, 2, 16)
    assert get_backend("torch").path_for(problem) == "gather"
    assert get_backend("torch:attention=masked").path_for(problem) == "masked"
    assert "attention=gather, dense=matmul" in get_backend("torch").capabilities.notes
    assert "attention=masked" in get_backend("torch", attention="masked").capabilities.notes


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (("float64", 64, 16), "dtype float64 is not one of"),
        (("float32", 64, 24), "page_size 24 is not a multiple of 16"),
        (("float32", 80, 16), "head_dim 80 is not a power of two"),
    ],
)
def test_what_flexattention_cannot_do_is_said(facts: tuple[str, int, int], reason: str) -> None:
    assert [text for text in flex.why_not(*facts) if reason in text]
    assert flex.why_not("bfloat16", 128, 64) == []


def test_caches_that_flexattention_cannot_address_are_not_copied() -> None:
    pages = torch.zeros(4, 2, 16, 32)
    by_token = torch.zeros(4, 16, 2, 32).transpose(1, 2)
    assert flex.why_not_pages(pages, pages) == ()
    assert "side by side" in flex.why_not_pages(by_token, by_token)[0]
    assert "side by side" in flex.why_not_pages(pages, by_token)[0]
    huge = torch.empty(2**22, 2, 16, 32, device="meta")
    assert "4294967296 elements" in flex.why_not_pages(huge, huge)[0]


def test_flexattention_refuses_such_caches_where_it_was_asked_for() -> None:
    backend = get_backend("torch")
    backend.attention = "flex"  # as on a GPU
    by_token = torch.zeros(4, 16, 2, 32).transpose(1, 2)
    table = torch.arange(4, dtype=torch.int32)[None]
    context = Context(by_token, by_token, table, torch.full((1, 4), 16, dtype=torch.int32))
    everyone = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match=r"side by side.*attention='masked' computes it"):
        backend.attend_pages(torch.zeros(1, 4, 3, 32), context, Selection.all_pages(context, 3), everyone)


@pytest.mark.parametrize(
    ("options", "rule"), [({"attention": "flex"}, "needs a GPU"), ({"dense": "flash"}, "dense='flash' needs a GPU")]
)
def test_a_way_that_a_processor_lacks_is_refused(options: dict[str, str], rule: str) -> None:
    with pytest.raises(UnsupportedError, match=rule):
        get_backend("torch", **options)


MEMORY = """
import resource, sys, torch
from sparse_dlm_attn import Context, Selection, get_backend
torch.set_num_threads(1)
pages = 1024
k = torch.zeros(1, 8, pages * 64, 64)
context = Context.from_dense(k, k, 64)
mask = torch.zeros(1, 8, 1, pages, dtype=torch.bool)
mask[..., ::32] = True
q, active = torch.zeros(1, 32, 16, 64), torch.ones(1, 16, dtype=torch.bool)
backend = get_backend("torch", attention=sys.argv[1])
small = Context.from_dense(k[:, :, :256].contiguous(), k[:, :, :256].contiguous(), 64)
backend.attend_pages(q, small, Selection(mask[..., :4], 16), active)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
backend.attend_pages(q, context, Selection(mask, 16), active)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, k.numel() * 4 // 1024)
"""


def test_gathering_holds_one_head_s_selected_pages_not_the_context() -> None:
    """In a process of its own, since a peak is never forgotten. Whole K: 128 MiB; selected: 4 MiB."""
    run = subprocess.run([sys.executable, "-c", MEMORY, "gather"], capture_output=True, text=True, check=True)
    extra, keys = map(int, run.stdout.split())
    assert keys == 128 << 10
    assert extra < 16 << 10
