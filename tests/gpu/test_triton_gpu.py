"""The Triton backend on a GPU: what a steady state asks of the allocator, tuned launches, what is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs PyTorch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that PyTorch can use", allow_module_level=True)
pytest.importorskip("triton", reason="the Triton backend needs Triton")

from sparse_dlm_attn import PassInfo, PrefixAttention, UnavailableError, get_backend  # noqa: E402
from sparse_dlm_attn_benchmarks.break_even import measure_context  # noqa: E402
from sparse_dlm_attn_benchmarks.layer import layers, runner  # noqa: E402
from sparse_dlm_attn_benchmarks.peers import DENSE, dense_peers  # noqa: E402
from sparse_dlm_attn_benchmarks.shape import Shape  # noqa: E402
from sparse_dlm_attn_benchmarks.sparse_peers import SPARSE, Chosen, sparse_peers  # noqa: E402
from sparse_dlm_attn_benchmarks.tuning import tune_shape  # noqa: E402
from sparse_dlm_attn_triton import TritonBackend, settings  # noqa: E402

SHAPE = Shape(batch=2, context=8192, page_size=64)
PASSES = 100
POLICIES = (
    "dense",
    "losa:budget=512",
    "quest:budget=512",
    "mage:dense_layers=0,budget=512",
    "flashblock",
    "sliding-window",
)


@pytest.fixture(scope="module")
def made() -> Any:
    return layers(SHAPE, TritonBackend(), share=1.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_steady_state_takes_no_memory_from_the_driver(policy: str, made: Any) -> None:
    """Results are new tensors, whose memory PyTorch hands out again: a few passes bring all of it."""
    one = made[0]
    attention = PrefixAttention(policy, TritonBackend())

    decoded = torch.zeros(one.q.shape[0], one.q.shape[2], dtype=torch.bool, device="cuda")
    decoded[:, 0] = True

    def block(passes: int) -> None:
        memory = None
        for index in range(passes):
            q = one.q if index % 2 else one.q_next
            info = PassInfo(index, newly_decoded=decoded if index else None)
            _, memory = attention(q, one.k, one.v, one.context, memory, info)

    block(4)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    block(PASSES)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    grown = {
        name: after[name] - before[name]
        for name in (
            "segment.all.allocated",
            "num_alloc_retries",
            "num_ooms",
            "reserved_bytes.all.current",
            "allocation.all.allocated",
            "num_device_alloc",
        )
        if name in after
    }
    print(f"\n{policy}: over {PASSES} passes {grown}", end="")
    assert grown["segment.all.allocated"] == 0
    assert grown["num_alloc_retries"] == 0
    assert grown["reserved_bytes.all.current"] == 0
    assert grown["allocation.all.allocated"] > 0  # the counters count


@pytest.mark.parametrize("policy", POLICIES[:4])
def test_a_captured_pass_allocates_nothing(policy: str, made: Any) -> None:
    run = runner(policy, TritonBackend(), made[0])
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(PASSES):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_bounds_grow_without_a_look_at_finished_pages(made: Any) -> None:
    context, backend = made[0].context, TritonBackend()
    grown = backend.extend_bounds(context, context.bounds, context.pages - 1)
    assert torch.equal(grown.lower, context.bounds.lower)
    assert torch.equal(grown.upper, context.bounds.upper)


def test_tuned_settings_are_found_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept.json"
    monkeypatch.setenv("SDA_TRITON_SETTINGS", str(kept))
    with pytest.raises(UnavailableError, match="sparse-dlm-attn tune"):
        get_backend("triton:tuned=true")
    steps: list[int] = []
    found = tune_shape(SHAPE, "losa", TritonBackend(), 6, 5, lambda: steps.append(1))
    print(f"\n{found}", end="")
    assert 1 <= len(steps) <= 6
    assert found.tuned_us <= found.default_us
    settings.store(kept, [found])
    try:
        backend = get_backend("triton:tuned=true")
        assert settings.nearest(torch.device("cuda", 0), found.kind) == found.settings
        one = layers(SHAPE, backend, share=1.0)[0]
        out = runner("losa:budget=512", backend, one)()[0]
        assert bool(out.isfinite().all())
        other = layers(Shape(context=8192, page_size=32), backend, share=1.0)[0]
        with pytest.raises(UnavailableError, match="page_size=32"):
            runner("dense", backend, other)()
    finally:
        settings._tuned.clear()
        settings.nearest.cache_clear()


def test_every_peer_that_imports_is_right(made: Any) -> None:
    found: dict[str, Any] = dict(dense_peers(made, SHAPE, tuple(DENSE)))
    mask = torch.rand(2, 8, 1, SHAPE.context // SHAPE.page_size, device="cuda") < 0.2
    mask[..., 0] = True
    active = torch.zeros(2, SHAPE.tokens, dtype=torch.bool, device="cuda")
    active[0, :5] = active[1, 3:8] = True
    found |= sparse_peers([Chosen(one, mask, active) for one in made], SHAPE, tuple(SPARSE))
    for name, there in found.items():
        print(f"\n{name}: {there if isinstance(there, str) else 'right'}", end="")
    assert not isinstance(found["SDPA flash, group folded"], str)
    assert not [name for name, there in found.items() if "wrong result" in str(there)]


def test_break_even_measures(capsys: pytest.CaptureFixture[str]) -> None:
    points = measure_context(Shape(context=16384), "losa", (0.1, 0.5), TritonBackend(), 5, print)
    print(points)
    assert all(0 < point.sparse_us < 1e5 and 0 < point.dense_us < 1e5 for point in points)
    assert points[0].density < points[1].density
