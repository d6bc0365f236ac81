"""flash-attn and FlashInfer as backends on a GPU: each library that can be imported here is run."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the backends need PyTorch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that PyTorch can use", allow_module_level=True)

from sparse_dlm_attn import Context, PassInfo, PrefixAttention, Selection, UnavailableError  # noqa: E402
from sparse_dlm_attn.policies.losa import Losa  # noqa: E402
from sparse_dlm_attn.policies.quest import Quest  # noqa: E402
from sparse_dlm_attn_conformance import check_backend  # noqa: E402
from sparse_dlm_attn_flash import FlashAttentionBackend, FlashInferBackend  # noqa: E402
from sparse_dlm_attn_flash.flash_attn import MODULES  # noqa: E402
from sparse_dlm_attn_torch import TorchBackend  # noqa: E402

KERNELS = [
    *(pytest.param("packed", module, id=module) for module in MODULES),
    *(pytest.param("paged", module, id=f"{module} paged") for module in MODULES),
    pytest.param("flashinfer", None, id="flashinfer"),
]
EACH = pytest.mark.parametrize(("kind", "module"), KERNELS)


def made(kind: str, module: str | None) -> Any:
    """Return a backend, or skip with what is missing."""
    try:
        return FlashInferBackend() if kind == "flashinfer" else FlashAttentionBackend(kind, module)
    except UnavailableError as error:
        pytest.skip(str(error)[:300])


def problem(page_size: int = 64) -> tuple[Any, ...]:
    """Two sequences with short pages in the middle and an absent one, 8 query and 2 KV heads."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 16, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    pools = [torch.randn(24, 2, page_size, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    table = torch.randperm(24, device="cuda").to(torch.int32).view(2, 12)
    lengths = torch.full((2, 12), page_size, device="cuda", dtype=torch.int32)
    lengths[0, 3], lengths[0, 11], lengths[1, 5], lengths[1, 6] = 17, 1, 0, 63
    return q, k, v, Context(*pools, table, lengths)


@EACH
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_selected_pages_are_attended_to_as_by_pytorch(kind: str, module: str | None, heads: int) -> None:
    backend = made(kind, module)
    q, k, v, context = problem(256 if kind == "paged" else 64)
    mask = torch.rand(2, heads, 2, 12, device="cuda") < 0.5
    mask[0, 0] = False  # nothing selected
    active = torch.rand(2, 16, device="cuda") < 0.7
    selection = Selection(mask, 8)
    got = backend.attend_pages(q, context, selection, active)
    want = TorchBackend("cuda").attend_pages(q, context, selection, active)
    assert torch.equal(got.lse.isneginf(), want.lse.isneginf())
    finite = ~want.lse.isneginf()
    torch.testing.assert_close(got.lse[finite], want.lse[finite], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(got.out, want.out, atol=2e-2, rtol=2e-2)
    got, want = backend.attend_block(q, k, v), TorchBackend("cuda").attend_block(q, k, v)
    torch.testing.assert_close(got.lse, want.lse, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(got.out, want.out, atol=2e-2, rtol=2e-2)


@EACH
def test_passes_of_policies_agree_with_pytorch(kind: str, module: str | None) -> None:
    backend = made(kind, module)
    q, k, v, context = problem(256 if kind == "paged" else 64)
    for policy in (Quest(budget=512), Losa(budget=512, active=3)):
        outs = []
        for computes in (backend, TorchBackend("cuda")):
            attention, memory = PrefixAttention(policy, computes), None
            for index in range(2):
                out, memory = attention(q + index * 0.01, k, v, context, memory, PassInfo(index))
            outs.append(out)
        torch.testing.assert_close(*outs, atol=2e-2, rtol=2e-2)


@EACH
def test_the_suite_accepts_it(kind: str, module: str | None) -> None:
    found = check_backend(
        made(kind, module),
        clauses=("ATTEND-1", "BLOCK-1", "CONTEXT-2"),
        dtypes=("bfloat16",),
        first_only=True,
        shrink=False,
    )
    assert not found, found[0].text
