"""Peers that can run are right, those that are wrong or missing say so; kernels are stand-ins on a CPU."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bench needs PyTorch")

from sparse_dlm_attn_bench import layer  # noqa: E402
from sparse_dlm_attn_bench.layer import Layer, layers  # noqa: E402
from sparse_dlm_attn_bench.peers import DENSE, dense_peers, expected_dense  # noqa: E402
from sparse_dlm_attn_bench.shape import Shape  # noqa: E402
from sparse_dlm_attn_bench.sparse_peers import Chosen, Found, sparse_peers  # noqa: E402
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


class Wrapper:
    """FlashInfer's wrapper for any number of heads, by its stand-in for one."""

    def __init__(self, workspace: Any, layout: str, backend: str) -> None:
        assert (layout, backend) == ("HND", "fa2")

    def plan(self, *lists: Any, num_qo_heads: int, num_kv_heads: int, **options: Any) -> None:
        from stand_ins import PrefillWrapper

        self.heads = num_qo_heads, num_kv_heads
        self.inner = PrefillWrapper()
        self.inner.plan(*lists, num_qo_heads=1, num_kv_heads=1, **options)

    def run(self, q: Any, cache: Any, *, return_lse: bool) -> Any:
        group = self.heads[0] // self.heads[1]
        parts = [
            self.inner.run(
                q[:, head : head + 1], tuple(side[:, head // group, None] for side in cache),
                return_lse=return_lse,
            ) for head in range(self.heads[0])
        ]
        return tuple(torch.cat(side, 1) for side in zip(*parts, strict=True))


def test_expected_dense_attention_is_that_of_pytorch(made: list[Layer]) -> None:
    out, lse = expected_dense(made[0])
    wanted = torch.nn.functional.scaled_dot_product_attention(made[0].q_next, *made[0].cache, enable_gqa=True)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
    keys = made[0].cache[0].repeat_interleave(2, 1)
    torch.testing.assert_close(lse, (made[0].q_next @ keys.mT / 4).logsumexp(-1), atol=1e-5, rtol=0)


def test_flashinfer_serves_dense_and_sparse(
    made: list[Layer], chosen: list[Chosen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper))
    works = dense_peers(made, SHAPE, ("FlashInfer paged",))["FlashInfer paged"]
    assert not isinstance(works, str), works
    assert len(works) == len(made)
    found = sparse_peers(chosen, SHAPE, ("FlashInfer paged, heads folded",))
    one = found["FlashInfer paged, heads folded"]
    assert isinstance(one, Found), one
    assert one.plan_us is not None
    assert one.plan_us > 0


def test_flash_attn_serves_lists_as_block_tables(chosen: list[Chosen], monkeypatch: pytest.MonkeyPatch) -> None:
    from stand_ins import flash_attn_with_kvcache

    module = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    found = sparse_peers(chosen, SHAPE, ("flash-attn 2 paged, heads folded",))
    assert isinstance(found["flash-attn 2 paged, heads folded"], Found), found


def test_a_peer_that_is_wrong_is_not_timed(made: list[Layer], monkeypatch: pytest.MonkeyPatch) -> None:
    class BaseE(Wrapper):
        def run(self, *arguments: Any, **options: Any) -> Any:
            out, lse = super().run(*arguments, **options)
            return out, lse * math.log(2.0)

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=BaseE))
    said = dense_peers(made, SHAPE, ("FlashInfer paged",))["FlashInfer paged"]
    assert isinstance(said, str)
    assert said.startswith("wrong result")


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


def test_a_wheel_without_paged_kv_is_not_called(chosen: list[Chosen], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"build_flags": {"FLASHATTENTION_DISABLE_PAGEDKV": True}}
    module = SimpleNamespace(__name__="fa3_fwd_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    monkeypatch.setitem(sys.modules, "fa3_fwd_config", SimpleNamespace(CONFIG=flags))
    name = "flash-attn 3 paged, heads folded"
    assert "built without paged KV" in str(sparse_peers(chosen, SHAPE, (name,))[name])
