"""Peers that can run are right, those that are wrong or missing say so; kernels are stand-ins on a CPU."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch", reason="the bench needs PyTorch")

from sparse_dlm_attn_bench import layer  # noqa: E402
from sparse_dlm_attn_bench.layer import Layer, layers  # noqa: E402
from sparse_dlm_attn_bench.peers import DENSE, dense_peers, expected_dense  # noqa: E402
from sparse_dlm_attn_bench.shape import Shape  # noqa: E402
from sparse_dlm_attn_bench.sparse_peers import Chosen, sparse_peers  # noqa: E402
from sparse_dlm_attn_torch import TorchBackend  # noqa: E402

SHAPE = Shape(batch=2, context=512, tokens=4, q_heads=4, kv_heads=2, head_dim=16, page_size=256, dtype="float32")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Layer]:
    monkeypatch.setattr(layer, "COLD_BYTES", 1)
    return layers(SHAPE, TorchBackend(), device="cpu")


@pytest.fixture
def chosen(made: list[Layer]) -> list[Chosen]:
    """Two active rows a sequence, other pages for each KV head."""
    active = torch.tensor([[True, False, True, False], [False, True, True, False]])
    mask = torch.tensor([[[True, False], [True, True]], [[False, True], [True, False]]])[:, :, None]
    return [Chosen(one, mask, active) for one in made]


def test_expected_dense_attention_is_that_of_pytorch(made: list[Layer]) -> None:
    out, lse = expected_dense(made[0])
    wanted = torch.nn.functional.scaled_dot_product_attention(made[0].q_next, *made[0].cache, enable_gqa=True)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
    keys = made[0].cache[0].repeat_interleave(2, 1)
    torch.testing.assert_close(lse, (made[0].q_next @ keys.mT / 4).logsumexp(-1), atol=1e-5, rtol=0)


def test_a_peer_that_is_missing_says_why(
    made: list[Layer], chosen: list[Chosen], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("flash_attn", "flash_attn_interface", "fa3_fwd_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)
    names = tuple(name for name in DENSE if "flash-attn" in name or "FlashInfer paged" in name)
    for said in (*dense_peers(made, SHAPE, names).values(), *sparse_peers(chosen, SHAPE, (
        "FlashInfer paged, heads folded", "flash-attn 3 paged, heads folded",
    )).values()):
        assert isinstance(said, str)
        assert said.startswith("ModuleNotFoundError")
