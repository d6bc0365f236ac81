"""Settings of the process decide nothing: neither precision, nor dtype, nor device."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs PyTorch")
pytest.importorskip("triton", reason="triton is not installed")

from sparse_dlm_attn import Context, PassInfo, PrefixAttention  # noqa: E402

KIND = "cuda" if torch.cuda.is_available() else "cpu"


def passes(policy: str) -> list[Any]:
    """Return outputs, states and decisions of two passes."""
    made = torch.Generator("cpu").manual_seed(0)
    cache, block, queries = (
        torch.randn(shape, generator=made, device="cpu", dtype=torch.float32).to(KIND)
        for shape in ((2, 1, 2, 48, 16), (2, 1, 2, 4, 16), (2, 1, 4, 4, 16))
    )
    attention, memory, results = PrefixAttention(policy, "triton"), None, []
    context = Context.from_dense(*cache, 8)
    for index, q in enumerate(queries):
        out, memory = attention(q, *block, context, memory, PassInfo(index, total_passes=3))
        results += [out, memory.state.out, memory.state.lse, memory.selection.mask, memory.active]
    return results


@pytest.mark.clause("PURE-6")
@pytest.mark.parametrize("policy", ["losa:budget=16,active=2", "sparsed:warmup=1"])
def test_no_setting_changes_a_pass(policy: str) -> None:
    wanted = passes(policy)

    def expect_same() -> None:
        for got, want in zip(passes(policy), wanted, strict=True):
            assert got.device == want.device and got.dtype == want.dtype
            assert torch.equal(got, want)

    with torch.autocast(KIND, dtype=torch.bfloat16):
        expect_same()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        expect_same()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
