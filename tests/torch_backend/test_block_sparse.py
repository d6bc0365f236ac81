"""Path "block-sparse": what it refuses, and that the lists it hands to the library are the selection."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch backend needs PyTorch")

from sparse_dlm_attn import Context, InvalidArgumentError, Selection, UnavailableError, UnsupportedError, get_backend  # noqa: E402
from sparse_dlm_attn_torch import block_sparse, choice, flex  # noqa: E402


@pytest.mark.clause("ERROR-1")
def test_it_is_taken_on_a_gpu_alone_and_never_replaced() -> None:
    with pytest.raises(UnsupportedError, match="attention='block-sparse' needs a GPU"):
        get_backend("torch", attention="block-sparse")
    with pytest.raises(InvalidArgumentError, match="must be one of auto, gather, masked, flex, block-sparse"):
        get_backend("torch", attention="block_sparse")


@pytest.mark.clause("REGISTRY-1")
def test_without_its_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    with pytest.raises(UnavailableError, match=r"flash_attn\.cute.*Install flash-attn 4"):
        choice.check_attention("block-sparse", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
    assert choice.check_attention("block-sparse", torch.device("cuda")) == "block-sparse"


def problem(
    tokens: int, lengths: list[list[int]], heads: tuple[int, int], listed: int, span: int = 128
) -> tuple[list[Any], Context]:
    torch.manual_seed(0)
    valid = torch.tensor(lengths, dtype=torch.int32)
    batch, pages = valid.shape
    k, v = (torch.randn(batch * pages + 1, heads[1], 128, 64).half() for _ in range(2))
    table = torch.randperm(batch * pages + 1)[: batch * pages].reshape(batch, pages).int()
    for b in range(batch):
        for page in range(pages):
            for side in (k, v):
                side[table[b, page], :, valid[b, page] :] = math.nan
    table = torch.where(valid > 0, table, 2**30)
    q = torch.randn(batch, heads[0], tokens, 64).half()
    mask = torch.rand(batch, listed, -(-tokens // min(span, tokens)), pages) < 0.5
    active = torch.rand(batch, tokens) < 0.7
    return [q, k, v, table, valid, mask, min(span, tokens), active, 0.125], Context(k, v, table, valid)


def whole_attention(q: Any, k: Any, v: Any, lists: Any, scale: float) -> tuple[Any, Any]:
    """Do what flash-attn 4 does with lists of whole blocks; rows without any, or with NaN, are empty."""
    keep = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    rows, keys = torch.arange(q.shape[2]) // 128, torch.arange(k.shape[2]) // 128
    for b, h, s in torch.cartesian_prod(*(torch.arange(n) for n in lists.counts.shape)).tolist():
        for page in lists.pages[b, h, s, : lists.counts[b, h, s]].tolist():
            keep[b, h] |= (rows == s)[:, None] & (keys == page)
    out, lse = masked_attention(q, k, v, keep, scale)
    empty = ~lse.isfinite()
    return out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -math.inf)


def masked_attention(q: Any, k: Any, v: Any, keep: Any, scale: float) -> tuple[Any, Any]:
    group = q.shape[1] // k.shape[1]
    k, v = (side.float().repeat_interleave(group, 1) for side in (k, v))
    logits = (q.float() @ k.mT * scale).masked_fill(~keep, -math.inf)
    return (logits.softmax(-1) @ v).to(q.dtype), logits.logsumexp(-1)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put plain products in flash-attn's place; FlexAttention itself runs, traced but not compiled."""
    monkeypatch.setattr(block_sparse, "flash_attn_listed", whole_attention)
    monkeypatch.setattr(flex, "compiler", "eager")


@pytest.mark.parametrize(
    ("tokens", "lengths", "heads", "listed", "span"),
    [
        (256, [[128] * 3], (2, 2), 2, 128),
        (300, [[128, 9, 128, 0], [0, 128, 128, 77]], (4, 2), 1, 128),
        (290, [[128, 128, 50]], (4, 2), 4, 128),
        (100, [[128, 128]], (2, 1), 1, 128),
        (300, [[128, 90]], (4, 2), 4, 300),
        (290, [[128, 7, 128]], (2, 2), 2, 32),
        (16, [[128, 90]], (2, 1), 2, 1),
        (300, [[128, 128]], (2, 2), 1, 48),
    ],
)
@pytest.mark.clause("ATTEND-1", "ATTEND-2")
def test_the_lists_are_the_selection(
    tokens: int,
    lengths: list[list[int]],
    heads: tuple[int, int],
    listed: int,
    span: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, context = problem(tokens, lengths, heads, listed, span)
    stand_in(monkeypatch)
    out, lse = block_sparse.attend_pages(*arguments)
    q, mask, span, active = arguments[0], *arguments[5:8]
    wanted = get_backend("torch").attend_pages(q, context, Selection(mask, span), active, scale=0.125)
    torch.testing.assert_close(out, wanted.out, atol=4e-3, rtol=0)
    torch.testing.assert_close(lse, wanted.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.clause("ATTEND-1")
def test_any_number_of_spans_and_strides_of_tables_compile_at_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's limit is eight forms of what is compiled for a shape."""
    stand_in(monkeypatch)
    for span in range(71, 81):  # each pads 140 rows to another length
        arguments, context = problem(140, [[128, 60], [128, 128]], (2, 2), 2, span)
        for place in (3, 4):  # page tables and lengths, as views of wider ones
            wide = torch.zeros(2, span, dtype=torch.int32)
            wide[:, :2] = arguments[place]
            arguments[place] = wide[:, :2]
        out, _ = block_sparse.attend_pages(*arguments)
        q, mask, active = arguments[0], arguments[5], arguments[7]
        wanted = get_backend("torch").attend_pages(q, context, Selection(mask, span), active, scale=0.125)
        torch.testing.assert_close(out, wanted.out, atol=4e-3, rtol=0)


@pytest.mark.clause("ATTEND-3")
def test_a_value_that_is_not_finite_reaches_no_row_of_its_tile_that_did_not_select_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, context = problem(40, [[128, 128, 70]], (4, 2), 4, 1)
    stand_in(monkeypatch)
    for page, value in ((0, math.inf), (1, math.nan)):
        arguments[2][arguments[3][0, page], 1, 5, 7 + page] = value
    out, _ = block_sparse.attend_pages(*arguments)
    q, mask, span, active = arguments[0], *arguments[5:8]
    wanted = get_backend("torch").attend_pages(q, context, Selection(mask, span), active, scale=0.125)
    assert torch.equal(out.isfinite(), wanted.out.isfinite())
    assert not bool(out.isfinite().all())
    assert bool(out[:, 2:].isfinite().any(dim=-1).any())


@pytest.mark.clause("MERGE-4", "STATE-1")
@pytest.mark.parametrize(("side", "value"), [(1, math.nan), (1, math.inf), (2, math.nan), (0, math.nan)])
def test_what_flash_attn_would_hide_shows(side: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, context = problem(140, [[128, 128]], (2, 2), 1)
    stand_in(monkeypatch)
    arguments[5][:], arguments[7][:] = True, True
    if side:
        arguments[side][arguments[3][0, 1], 0, 9, 3] = value
    else:
        arguments[0][0, 0, 5, 3] = value
    out, lse = block_sparse.attend_pages(*arguments)
    q, mask, span, active = arguments[0], *arguments[5:8]
    wanted = get_backend("torch").attend_pages(q, context, Selection(mask, span), active, scale=0.125)
    assert torch.equal(out.isfinite(), wanted.out.isfinite())
    assert torch.equal(lse.isnan(), wanted.lse.isnan())
    assert not bool(out.isfinite().all())


@pytest.mark.parametrize(
    ("change", "rule"), [({"dtype": torch.float32}, "dtype float32"), ({"page": 64}, "page_size 64 is not 128")]
)
@pytest.mark.clause("ERROR-2")
def test_what_its_tile_does_not_fit_is_refused(change: dict[str, Any], rule: str) -> None:
    arguments, _ = problem(300, [[128, 128]], (2, 2), 1)
    for i in range(3):
        arguments[i] = arguments[i].to(change.get("dtype", torch.float16))
    for i in (1, 2):
        arguments[i] = arguments[i][:, :, : change.get("page", 128)]
    with pytest.raises(UnsupportedError, match=rule):
        block_sparse.attend_pages(*arguments)
