"""The selection sweep against the reference, in float64."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels need PyTorch")
pytest.importorskip("triton", reason="the Triton kernels need Triton")

from sparse_dlm_attn import Context, Selection, get_backend  # noqa: E402
from sparse_dlm_attn_triton.pooled import context_lse, pooled_scores  # noqa: E402
from sparse_dlm_attn_triton.span_tiles import Tile  # noqa: E402

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
REFERENCE = get_backend("reference")


def problem(
    tokens: int,
    page: int,
    lengths: list[list[int]],
    dim: int = 16,
    heads: tuple[int, int] = (2, 2),
    dtype: str = "float32",
    seed: int = 0,
) -> dict[str, Any]:
    """Queries and pages on the host; NaN behind a page's length, wild entries of absent pages."""
    torch.manual_seed(seed)
    valid = torch.tensor(lengths, dtype=torch.int32)
    batch, pages = valid.shape
    count = batch * pages + 2
    k = torch.randn(count, heads[1], page, dim).to(getattr(torch, dtype))
    table = torch.randperm(count)[: batch * pages].reshape(batch, pages)
    for b, at in np.ndindex(batch, pages):
        k[table[b, at], :, valid[b, at] :] = math.nan
    table = torch.where(valid > 0, table, -(2**31))
    q = torch.randn(batch, heads[0], tokens, dim).to(k.dtype)
    return {"q": q, "k_pages": k, "page_table": table.int(), "page_lengths": valid}


def on_device(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) for name, value in values.items()}


def context_of(values: dict[str, Any]) -> Context:
    keys = values["k_pages"].numpy().astype(np.float64)
    return Context(keys, keys, values["page_table"].numpy(), values["page_lengths"].numpy())


def lse_of(values: dict[str, Any], scale: float) -> np.ndarray:
    q = values["q"].numpy().astype(np.float64)
    everything = Selection(np.ones((len(q), 1, 1, values["page_lengths"].shape[1]), bool), q.shape[2])
    active = np.ones((len(q), q.shape[2]), bool)
    return REFERENCE.attend_pages(q, context_of(values), everything, active, scale=scale).lse


CASES = [
    # rows, page, lengths, span, head dim, heads, dtype, tile
    (70, 16, [[16] * 5], 32, 16, (2, 1), "float32", None),
    (130, 32, [[32] * 7], 64, 64, (2, 1), "float16", Tile(128, 64, 4, 2)),
    (40, 128, [[128, 128, 60]], 128, 80, (4, 1), "float16", Tile(64, 64, 4, 2)),
    (50, 24, [[24, 24, 7, 0], [0, 24, 24, 24]], 20, 96, (3, 1), "float32", Tile(64, 64, 4, 2)),
    (33, 1, [[1] * 45 + [0, 1]], 1, 16, (2, 2), "float32", Tile(16, 32, 4, 2)),
    (100, 20, [[20] * 4], 1000, 32, (2, 1), "float16", Tile(32, 32, 4, 2)),  # several tiles a span
    (20, 256, [[0, 256, 30]], 8, 256, (1, 1), "float32", None),
    (17, 8, [[0, 0, 8, 3, 8, 8, 0, 8, 0]], 5, 16, (8, 1), "float32", Tile(32, 16, 4, 2)),
]


@pytest.mark.parametrize("given", [True, False], ids=["lse", "no-lse"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}x{case[1]}")
def test_it_is_the_mean_softmax_mass(case: tuple[Any, ...], given: bool) -> None:
    tokens, page, lengths, span, dim, heads, dtype, tile = case
    values = problem(tokens, page, lengths, dim, heads, dtype)
    scale = dim**-0.5
    lse = torch.tensor(lse_of(values, scale)).to(DEVICE) if given else None
    got = pooled_scores(**on_device(values), span=span, scale=scale, lse=lse, tile=tile).cpu().numpy()
    q = values["q"].numpy().astype(np.float64)
    wanted = REFERENCE.pooled_scores(q, context_of(values), span=span, scale=scale)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=2e-6, rtol=2e-5)
    np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-5)
    assert (got[np.broadcast_to((values["page_lengths"] == 0)[:, None, None].numpy(), got.shape)] == 0).all()


def test_the_sweep_without_values_finds_the_lse() -> None:
    values = problem(40, 16, [[16, 16, 4, 0, 16], [0] * 5])
    got = context_lse(**on_device(values), scale=0.25).cpu().numpy()
    np.testing.assert_allclose(got[0], lse_of(values, 0.25)[0], atol=2e-6, rtol=1e-6)
    assert np.isneginf(got[1]).all()


def test_no_score_exceeds_one_and_nan_shows() -> None:
    values = problem(16, 8, [[8, 8, 8]])
    lse = torch.full((1, 2, 16), -30.0)
    low = pooled_scores(**on_device(values), span=16, scale=0.25, lse=lse.to(DEVICE)).cpu()
    assert (low == 1).all()
    values["k_pages"][values["page_table"][0, 1], :, 0] = math.nan
    got = pooled_scores(**on_device(values), span=16, scale=0.25, lse=lse.to(DEVICE)).cpu()
    assert got[..., 1].isnan().all()
    assert torch.equal(got[..., ::2], low[..., ::2])


def test_an_lse_over_twice_the_keys_gives_half_the_mass() -> None:
    values = problem(16, 16, [[16, 16, 5]])
    lse = torch.tensor(lse_of(values, 0.25))
    whole, half = (
        pooled_scores(**on_device(values), span=8, scale=0.25, lse=(lse + more).to(DEVICE)).cpu()
        for more in (0.0, math.log(2.0))
    )
    torch.testing.assert_close(half, whole / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[[]], [[0, 0, 0]]])
def test_an_empty_context_has_no_mass(lengths: list[list[int]]) -> None:
    values = problem(16, 8, [[8, 8, 8]])
    values["page_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    values["page_table"] = values["page_table"][:, : len(lengths[0])]
    got = pooled_scores(**on_device(values), span=4, scale=1.0)
    assert got.shape == (1, 2, 4, len(lengths[0]))
    assert (got == 0).all()
