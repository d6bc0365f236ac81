"""The PyTorch backend beyond the conformance suite: what it refuses, and what it never copies."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch backend needs PyTorch")

from sparse_dlm_attn import (  # noqa: E402
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PassInfo,
    PrefixAttention,
    Selection,
    UnavailableError,
    UnknownNameError,
    UnsupportedError,
    get_backend,
)


def problem(tokens: int = 64, page_size: int = 16) -> tuple[list[torch.Tensor], Context]:
    torch.manual_seed(0)
    rows = [torch.randn(1, heads, 8, 32) for heads in (4, 2, 2)]
    return rows, Context.from_dense(torch.randn(1, 2, tokens, 32), torch.randn(1, 2, tokens, 32), page_size)


@pytest.mark.clause("ERROR-1", "ERROR-2")
@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:x", "", None, 3.5, "cpu:gpu"])
def test_a_device_it_does_not_serve_is_refused_not_replaced(device: object) -> None:
    with pytest.raises(InvalidArgumentError, match="device must be 'cpu', 'cuda' or 'cuda:<number>'; got"):
        get_backend("torch", device=device)


@pytest.mark.clause("REGISTRY-1")
def test_an_old_pytorch_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    with pytest.raises(UnavailableError, match=r"PyTorch 2\.4\.1 is older than 2\.5\. Upgrade it"):
        get_backend("torch")


@pytest.mark.clause("CAPS-1")
def test_tensors_on_another_device_are_refused_before_anything_runs() -> None:
    rows, context = problem()
    elsewhere = [row.to("meta") for row in rows]
    moved = Context(
        *(getattr(context, name).to("meta") for name in ("k_pages", "v_pages", "page_table", "page_lengths"))
    )
    with pytest.raises(UnsupportedError, match="device meta is not one of cpu"):
        PrefixAttention("dense", "torch")(*elsewhere, moved)
    with pytest.raises(InvalidArgumentError, match=r"context\.k_pages must be a Tensor on device cpu"):
        PrefixAttention("dense", "torch")(*rows, moved)
    with pytest.raises(InvalidArgumentError, match="k must be a Tensor"):
        PrefixAttention("dense", "torch")(rows[0], rows[1].numpy(), rows[2], context)


@pytest.mark.clause("ATTEND-3")
def test_a_value_that_is_not_finite_reaches_only_the_rows_that_read_it() -> None:
    (q, _, _), context = problem()
    context.v_pages[1] = torch.nan
    mask = torch.zeros(1, 4, 1, 4, dtype=torch.bool)
    mask[:, :, :, 0] = True
    mask[:, 1, :, 1] = True  # query head 1 alone reads the poisoned page; head 0 shares its KV head
    everyone = torch.ones(1, 8, dtype=torch.bool)
    state = get_backend("torch").attend_pages(q, context, Selection(mask, 8), everyone)
    assert state.out[:, 1].isnan().all()
    assert state.out[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("policy", ["losa:budget=32", "quest:budget=32", "mage:budget=32,dense_layers=0", "sparsed"])
def test_a_block_of_passes_runs_and_reads_less_than_everything(policy: str) -> None:
    rows, context = problem(tokens=512)
    attention, memory = PrefixAttention(policy, "torch"), None
    for index in range(3):
        out, memory = attention(*rows, context, memory, PassInfo(index, total_passes=3))
        rows[0] = rows[0] + 0.1 * torch.randn_like(rows[0])
        assert out.isfinite().all()
    assert float(memory.traffic.density[0]) < 1.0


@pytest.mark.clause("REGISTRY-1")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("spec", ["torch:device=cuda", "torch:device=cuda:1,attention=masked"])
def test_a_gpu_that_is_not_there_is_named_with_the_remedy(spec: str) -> None:
    with pytest.raises(UnavailableError, match=r"on device 'cuda(:1)?'.*or use device='cpu'"):
        get_backend(spec)


@pytest.mark.clause("CAPS-1")
def test_tensors_of_a_processor_are_not_moved_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidArgumentError, match="must name one of 2 GPUs, from cuda:0; got 'cuda:2'"):
        get_backend("torch", device="cuda:2")
    with pytest.raises(UnsupportedError, match="attention='flex' or 'masked' there"):
        get_backend("torch", device="cuda", attention="gather")
    rows, context = problem()
    backend = get_backend("torch", device="cuda")
    remedy = "move the tensors to 'cuda' or make the backend with device='cpu'"
    with pytest.raises(UnsupportedError, match=remedy):
        PrefixAttention("dense", backend)(*rows, context)
    with pytest.raises(InvalidArgumentError, match=r"Move it: tensor\.to\('cuda'\)"):
        backend.attend_block(*rows)


@pytest.mark.clause("ERROR-1")
def test_mixed_dtypes_and_channels_that_lie_apart_are_refused() -> None:
    rows, context = problem()
    attention = PrefixAttention("dense", "torch")
    with pytest.raises(InvalidArgumentError, match="must have head_dim 32 and dtype bfloat16, as q has"):
        attention(*(row.bfloat16() for row in rows), context)
    with pytest.raises(InvalidTypeError, match="k must have dtype float32; got dtype float64"):
        attention(rows[0], rows[1].double(), rows[2].double(), context)
    apart = torch.randn(4, 2, 32, 16).transpose(2, 3)
    with pytest.raises(InvalidArgumentError, match=r"contiguous in its last axis.*Copy it into contiguous"):
        Context(apart, apart, context.page_table, context.page_lengths)


@pytest.mark.clause("REGISTRY-1")
@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("torch:devise=cpu", UnknownNameError, "'devise'.*[Dd]id you mean 'device'"),
        ("torch:device=gpu", InvalidArgumentError, "device must be 'cpu', 'cuda' or 'cuda:<number>'"),
        ("torch:attention=fast", InvalidArgumentError, "attention must be one of auto, gather, masked, flex"),
        ("torch:dense=sdpa", InvalidArgumentError, "dense must be one of auto, matmul, flash"),
        ("torch:device=cpu,device=cpu", InvalidArgumentError, "must give each parameter once"),
    ],
)
def test_options_in_a_name_are_checked(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_backend(spec)


@pytest.mark.clause("ERROR-1")
def test_tensors_on_two_devices_are_refused() -> None:
    (q, k, v), context = problem()
    attention = PrefixAttention("dense", "torch")
    with pytest.raises(InvalidArgumentError, match=r"k must be a Tensor on device cpu, .*on meta"):
        attention(q, k.to("meta"), v, context)
    with pytest.raises(InvalidArgumentError, match=r"context\.k_pages must be .* on device meta, as q is"):
        attention(*(row.to("meta") for row in (q, k, v)), context)


def test_channels_of_a_block_may_lie_apart_unlike_those_of_pages() -> None:
    rows, context = problem()
    apart = [row.transpose(2, 3).contiguous().transpose(2, 3) for row in rows]
    assert all(row.stride(-1) != 1 for row in apart)
    for path in ("gather", "masked"):
        attention = PrefixAttention("dense", f"torch:attention={path}")
        got, wanted = (attention(*each, context)[0] for each in (apart, rows))
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.clause("MERGE-4", "STATE-2")
def test_a_row_that_selected_nothing_is_empty_beside_one_that_reads_nan() -> None:
    k = torch.zeros(1, 1, 2, 4)
    v = torch.full((1, 1, 2, 4), math.nan)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 2, dtype=torch.int32)
    mask = torch.tensor([True, False]).view(1, 1, 2, 1)
    active = torch.ones(1, 2, dtype=torch.bool)
    state = get_backend("torch").attend_pages(
        torch.zeros(1, 1, 2, 4), Context(k, v, table, lengths), Selection(mask, 1), active
    )
    assert bool(state.out[0, 0, 0].isnan().all())
    assert not bool(state.out[0, 0, 1].any())
    assert state.lse[0, 0, 1] == -math.inf
