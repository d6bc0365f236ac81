"""What ranks have sent, packed and merged in one process; on a CPU Triton interprets the kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from sparse_dlm_attn import AttentionState  # noqa: E402
from sparse_dlm_attn.operators import merge, reuse  # noqa: E402
from sparse_dlm_attn_distributed import merging  # noqa: E402
from sparse_dlm_attn_distributed.kernel import merge as merge_kernel  # noqa: E402
from sparse_dlm_attn_torch import TorchBackend  # noqa: E402

WAYS = pytest.mark.parametrize(
    ("way", "device"),
    [(merge_kernel, "cuda" if torch.cuda.is_available() else "cpu"), (partial(merging.finish, TorchBackend()), "cpu")],
    ids=["kernel", "operators"],
)


def states(count: int, shape: tuple[int, ...], dtype: Any, device: str = "cpu") -> list[AttentionState]:
    """Some rows of them empty, and then full of NaN, which must not show."""
    draw = torch.Generator().manual_seed(count)
    made = []
    for _ in range(count):
        out, lse = torch.randn(shape, generator=draw), 3 * torch.randn(shape[:3], generator=draw)
        empty = torch.rand(shape[:3], generator=draw) < 0.3
        out = torch.where(empty[..., None], torch.nan, out).to(device, dtype)
        made.append(AttentionState(out, torch.where(empty, -torch.inf, lse).to(device)))
    return made


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["context alone", "pass", "pass with reuse"])
def test_the_merge_of_all_ranks_is_the_merge_of_their_states(
    way: Any, device: str, dtype: Any, ranks: int, case: str
) -> None:
    *parts, block, cached = states(ranks + 2, (2, 4, 3, 24), dtype, device)
    cached = merge(cached)  # without the NaN of its empty rows
    active = torch.tensor([[True, False, True], [False, False, True]], device=device)
    want, given = merge(*parts), {}
    if case == "pass with reuse":
        want, given = reuse(active, want, cached), {"active": active, "cached": cached}
    if case != "context alone":
        given["block"] = block
    out, state = way(torch.stack([merging.packed(part) for part in parts]), 24, **given)
    room = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 4e-3}
    torch.testing.assert_close(state.out, want.out, **room)
    torch.testing.assert_close(state.lse, want.lse, atol=1e-5, rtol=1e-5)
    assert (out is None) == (case == "context alone")
    if out is not None:
        torch.testing.assert_close(out, merge(want, block).out, **room)


@WAYS
def test_nan_of_a_rank_with_weight_shows(way: Any, device: str) -> None:
    parts = states(2, (1, 1, 2, 16), torch.float32, device)
    parts[1].out[0, 0, 0, 3], parts[1].lse[0, 0, 0] = torch.nan, 0.0
    _, state = way(torch.stack([merging.packed(part) for part in parts]), 16)
    assert state.out[0, 0, 0].isnan().tolist() == [channel == 3 for channel in range(16)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_state_of_any_dtype_and_size_keeps_its_bits(dtype: Any) -> None:
    """An odd number of half channels, so that no LSE lies where float32 must."""
    (part,) = states(1, (1, 3, 1, 5), dtype)
    gathered = torch.stack([merging.packed(part), merging.packed(AttentionState.empty_like(part.out))])
    _, state = merging.finish(TorchBackend(), gathered, 5)
    assert torch.equal(state.lse, part.lse)
    kept = ~part.lse.isneginf()
    assert torch.equal(state.out[kept], part.out[kept])
