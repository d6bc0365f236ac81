"""Equal shares of all page lists, for batches of sequences that differ in length, under the laws."""

from __future__ import annotations

import os
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs PyTorch")
pytest.importorskip("triton", reason="the Triton backend needs Triton")

from sparse_dlm_attn import Context, InvalidTypeError, PassInfo, PrefixAttention, get_backend  # noqa: E402
from sparse_dlm_attn_conformance import test_attention, test_pass, test_ranked  # noqa: E402
from sparse_dlm_attn_conformance.cases import Case  # noqa: E402
from sparse_dlm_attn_conformance.subjects import Subject  # noqa: E402
from sparse_dlm_attn_conformance.tables import RankedRule  # noqa: E402
from sparse_dlm_attn_triton import TritonBackend  # noqa: E402

# The interpreter computes with NumPy, which warns where a GPU has NaN and infinity as results.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BACKEND = TritonBackend(ragged=True)

MIXED = Case(  # a long sequence between one of one page and one of none, a selection for each KV head
    kv_heads=2, head_dim=16, page_size=32, tokens=3,
    lengths=((7,) + (0,) * 8, (32, 32, 9, 32, 32, 0, 32, 32, 1), (0,) * 9),
    table=(tuple(range(9)), (5, 2, 0, 7, 8, -1, 3, 6, 1), (0,) * 9), num_pages=9, heads="kv", span=3,
    masks=(0b111111111, 0b110011111, 0b011110011), active=(0b111, 0b110, 0b011), poison="nan", seed=3,
)  # fmt: skip
GROUPED = Case(  # a selection for each query head and two rows; tiles of several pages; a sequence at rest
    group=2, head_dim=24, page_size=12, tokens=3,
    lengths=((12, 12, 12, 5, 12), (12, 12, 0, 12, 2), (12, 0, 0, 0, 0)),
    table=((3, 1, 4, 9, 2), (6, 0, 5, 8, 7), (10, 0, 0, 0, 0)), num_pages=11, heads="query", span=2,
    masks=(0b11101, 0b10111, 0b01110), active=(0b101, 0, 0b111), poison="nan", layout="token_major", seed=8,
)  # fmt: skip
CASES = {"mixed-float32": MIXED, "grouped-float16": GROUPED}
LAWS = (
    test_attention.test_attend_pages_equals_one_masked_softmax,
    test_attention.test_inactive_rows_get_out_0_and_lse_minus_inf,
    test_attention.test_pages_that_nobody_selected_are_not_read,
    test_attention.test_a_page_changes_only_the_rows_that_selected_it,
    test_pass.test_attend_is_one_softmax_over_context_and_block,
    test_pass.test_attend_composes_its_four_operators,
    test_pass.test_what_is_cached_for_active_rows_is_not_read,
)
RULE = RankedRule("count", count=2, pages=2, union="kv_head", keep="active_queries")


def subject(name: str) -> Subject:
    return Subject("triton", name.rpartition("-")[2], BACKEND)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: str(law.__name__.removeprefix("test_")))
@pytest.mark.parametrize("name", CASES)
def test_the_law_holds(name: str, law: Any) -> None:
    law.body(subject(name), case=CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_ranked_pass_computes_what_its_operators_compute(name: str) -> None:
    law = test_ranked.test_a_rule_computes_what_the_operators_compute
    law.body(subject(name), case=CASES[name], rule=RULE)


def batch(tokens: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Any:
        return torch.randn(sizes, generator=generator).to(DEVICE)

    pages = normal(12, 1, 16, 16)
    table = torch.arange(12, dtype=torch.int32).view(2, 6).to(DEVICE)
    lengths = torch.tensor([[16] * 6, [16, 3, 0, 0, 0, 0]], dtype=torch.int32, device=DEVICE)
    return {"q": normal(2, 2, tokens, 16), "k": normal(2, 1, tokens, 16), "v": normal(2, 1, tokens, 16),
            "context": Context(pages, pages + 1, table, lengths)}  # fmt: skip


@pytest.mark.parametrize("policy", ["dense", "losa:budget=32,active=3"])
def test_it_computes_what_fixed_splits_compute(policy: str) -> None:
    """Of long blocks too, where programs look for the few active rows."""
    outs = []
    for backend in (BACKEND, TritonBackend()):
        attention, memory, values = PrefixAttention(policy, backend), None, batch()
        for index in range(2):
            q = values["q"] + index * torch.linspace(0, 1, 64, device=DEVICE)[:, None]
            out, memory = attention(q, values["k"], values["v"], values["context"], memory, PassInfo(index))
        outs.append(out)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_it_is_an_option_of_the_name() -> None:
    assert get_backend("triton:ragged=true").ragged is True
    assert "ragged" in BACKEND.capabilities.notes
    assert "ragged=True" in repr(BACKEND)
    with pytest.raises(InvalidTypeError, match="ragged must be a bool"):
        TritonBackend(ragged="yes")  # type: ignore[arg-type]
