"""Block-sparse attention of long blocks against the reference, in float64, and the laws that it holds."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels need PyTorch")
pytest.importorskip("triton", reason="the Triton kernels need Triton")

from sparse_dlm_attn import Context, Selection, get_backend  # noqa: E402
from sparse_dlm_attn_triton.full_sequence import attend_spans, lists_for  # noqa: E402
from sparse_dlm_attn_triton.span_tiles import Tile  # noqa: E402

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HALF = {"float16": 4e-3, "float32": 1e-5}
REFERENCE = get_backend("reference")


@dataclass(frozen=True)
class Shape:
    """One problem; ``lengths`` gives the valid tokens of each page, else all are whole."""

    tokens: int
    span: int
    page: int
    pages: int
    dim: int = 16
    heads: tuple[int, int] = (2, 2)
    listed: int = 2
    dtype: str = "float32"
    lengths: tuple[int, ...] | None = None
    tile: Tile | None = None
    batch: int = 1


def arrays(shape: Shape, seed: int = 0, density: float = 0.5) -> dict[str, Any]:
    """Random tensors on the host; slots behind a page's length hold NaN, absent pages wild numbers."""
    torch.manual_seed(seed)
    q_heads, kv_heads = shape.heads
    count = shape.batch * shape.pages + 2
    dtype = getattr(torch, shape.dtype)
    k, v = (torch.randn(count, kv_heads, shape.page, shape.dim).to(dtype) for _ in range(2))
    table = torch.randperm(count)[: shape.batch * shape.pages].reshape(shape.batch, shape.pages)
    row = torch.tensor(shape.lengths or (shape.page,) * shape.pages)
    lengths = torch.stack([row.roll(b) for b in range(shape.batch)])
    for b, page in np.ndindex(shape.batch, shape.pages):
        k[table[b, page], :, lengths[b, page] :] = math.nan
        v[table[b, page], :, lengths[b, page] :] = math.nan
    table = torch.where(lengths > 0, table, 2**30)
    span = min(shape.span, shape.tokens)
    spans = -(-shape.tokens // span)
    return {
        "q": torch.randn(shape.batch, q_heads, shape.tokens, shape.dim).to(dtype),
        "k_pages": k,
        "v_pages": v,
        "page_table": table.int(),
        "page_lengths": lengths.int(),
        "mask": torch.rand(shape.batch, shape.listed, spans, shape.pages) < density,
        "span": shape.span,
        "active": torch.rand(shape.batch, shape.tokens) < 0.8,
        "scale": shape.dim**-0.5,
    }


def attend(values: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    on = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    out, lse = attend_spans(**on, **options)
    return out.cpu().numpy(), lse.cpu().numpy()


def expected(values: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    arrays = {name: value.numpy() for name, value in values.items() if isinstance(value, torch.Tensor)}
    q = arrays["q"].astype(np.float64)
    context = Context(
        arrays["k_pages"].astype(np.float64),
        arrays["v_pages"].astype(np.float64),
        arrays["page_table"],
        arrays["page_lengths"],
    )
    selection = Selection(arrays["mask"], min(values["span"], q.shape[2]))
    state = REFERENCE.attend_pages(q, context, selection, arrays["active"], scale=values["scale"])
    return state.out, state.lse


def check(values: dict[str, Any], dtype: str, **options: Any) -> None:
    out, lse = attend(values, **options)
    wanted, wanted_lse = expected(values)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(wanted_lse))
    there = np.isfinite(wanted_lse)
    np.testing.assert_allclose(lse[there], wanted_lse[there], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(out.astype(np.float64), wanted, atol=HALF[dtype], rtol=0)


SHAPES = [
    Shape(70, 32, 16, 5, heads=(2, 1), listed=1),
    Shape(70, 64, 32, 4, listed=1, tile=Tile(32, 32, 4, 2)),  # several tiles a span
    Shape(130, 128, 128, 2, dim=64, dtype="float16", tile=Tile(128, 64, 8, 3)),
    Shape(33, 32, 256, 2, dim=32, dtype="float16", lengths=(256, 9)),
    Shape(20, 1, 1, 40, tile=Tile(16, 16, 4, 2)),  # a row a span: sixteen lists a tile
    Shape(40, 1, 8, 6, heads=(4, 2), listed=1, tile=Tile(32, 64, 4, 2)),
    Shape(45, 12, 24, 4, dim=80, heads=(7, 1), listed=7, lengths=(24, 24, 0, 5), dtype="float16"),
    Shape(48, 24, 20, 5, dim=96, heads=(4, 1), listed=1, lengths=(20, 3, 20, 20, 1), batch=2),
    Shape(64, 16, 32, 5, heads=(8, 1), listed=1, dtype="float16", lengths=(32, 32, 32, 7, 0)),
    Shape(64, 32, 64, 3, heads=(4, 2), listed=2, dtype="float16", tile=Tile(64, 32, 4, 2), batch=2),
    Shape(64, 16, 16, 6, dtype="float16", tile=Tile(16, 32, 4, 2)),
    Shape(64, 16, 16, 6, dtype="float16", tile=Tile(64, 32, 4, 2)),  # four spans share a tile
    Shape(17, 1000, 48, 3, dim=256, heads=(1, 1), listed=1, lengths=(48, 48, 11)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.tokens}x{s.span}-{s.page}x{s.pages}-{s.dim}")
def test_it_is_the_softmax_over_the_selected_pages(shape: Shape) -> None:
    check(arrays(shape), shape.dtype, tile=shape.tile)


@pytest.mark.parametrize("where", ["k_pages", "v_pages"])
@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 2), Tile(64, 32, 4, 2)], ids=["apart", "together"])
@pytest.mark.parametrize("lengths", [(16, 16, 16, 16), (16, 5, 16, 16)], ids=["whole", "partial"])
def test_a_value_that_is_not_finite_reaches_only_rows_that_chose_its_page(
    where: str, tile: Tile, lengths: tuple[int, ...]
) -> None:
    values = arrays(Shape(64, 16, 16, 4, heads=(2, 1), listed=1, lengths=lengths))
    values["mask"][:] = True
    values["mask"][:, :, 1] = torch.tensor([True, False, True, True])
    values["active"][:] = True
    clean, clean_lse = attend(values, tile=tile)
    values[where][values["page_table"][0, 1], :, 2] = math.nan
    out, lse = attend(values, tile=tile)
    # Such a page is taken in after the others, which may round the sums of its neighbours otherwise.
    np.testing.assert_allclose(out[:, :, 16:32], clean[:, :, 16:32], atol=1e-6)
    np.testing.assert_allclose(lse[:, :, 16:32], clean_lse[:, :, 16:32], atol=1e-6)
    others = np.r_[0:16, 32:64]
    assert np.isnan(out[:, :, others]).all()
    assert np.isnan(lse[:, :, others]).all() == (where == "k_pages")


def test_a_dense_cache_is_read_where_it_lies() -> None:
    torch.manual_seed(1)
    k, v = (torch.randn(2, 64, 2, 32).transpose(1, 2) for _ in range(2))  # tokens outside of heads
    k, v = k.contiguous(), v.contiguous()
    context = Context.from_dense(k, v, 16, [64, 37])
    q = torch.randn(2, 40, 4, 32).transpose(1, 2)
    values = {
        "q": q,
        "k_pages": context.k_pages,
        "v_pages": context.v_pages,
        "page_table": context.page_table,
        "page_lengths": context.page_lengths,
        "mask": torch.rand(2, 4, 2, 4) < 0.6,
        "span": 32,
        "active": torch.ones(2, 40, dtype=torch.bool),
        "scale": 0.3,
    }
    if DEVICE == "cpu":  # moving an overlapping view to a GPU would unfold it
        check(values, "float32", tile=Tile(64, 64, 4, 2))


def test_lists_are_made_once_for_many_passes() -> None:
    values = arrays(Shape(64, 16, 16, 5, heads=(1, 1), listed=1, lengths=(16, 16, 16, 16, 3)))
    on = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    tile = Tile(32, 64, 4, 2)
    lists = lists_for(
        *(on[name] for name in ("q", "v_pages", "page_table", "page_lengths", "mask", "span", "active")), tile
    )
    counts = lists.counts.sum(-1).cpu()
    assert counts.shape == (1, 1, 2)
    assert (counts <= 5).all()
    other = torch.randn_like(values["q"])
    for q in (values["q"], other):
        fresh = attend({**values, "q": q}, tile=tile)
        kept = attend({**values, "q": q}, tile=tile, lists=lists)
        for got, wanted in zip(kept, fresh, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("axis", ["tokens", "pages", "physical", "batch"])
def test_nothing_to_do_is_done(axis: str) -> None:
    values = arrays(Shape(16, 16, 16, 2))
    if axis == "tokens":
        values |= {"q": values["q"][:, :, :0], "mask": values["mask"][:, :, :0], "active": values["active"][:, :0]}
    elif axis == "pages":
        values |= {
            "mask": values["mask"][..., :0],
            "page_table": values["page_table"][:, :0],
            "page_lengths": values["page_lengths"][:, :0],
        }
    elif axis == "physical":
        values |= {
            "k_pages": values["k_pages"][:0],
            "v_pages": values["v_pages"][:0],
            "page_lengths": values["page_lengths"] * 0,
        }
    else:
        values = {
            name: value[:0] if name in ("q", "mask", "active", "page_table", "page_lengths") else value
            for name, value in values.items()
        }
    out, lse = attend(values)
    assert out.shape == tuple(values["q"].shape)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_a_tile_that_cannot_use_tensor_descriptors_is_refused() -> None:
    values = arrays(Shape(16, 16, 24, 2))
    with pytest.raises(ValueError, match="use tma=False"):
        attend(values, tile=Tile(16, 16, 4, 2, tma=True))
