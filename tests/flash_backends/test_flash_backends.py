"""Head folding against the suite, with stand-ins for the kernels; and what is said where they are missing."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the backends need PyTorch")

import stand_ins  # noqa: E402

from sparse_dlm_attn import (  # noqa: E402
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PrefixAttention,
    Selection,
    UnavailableError,
    UnsupportedError,
    get_backend,
)
from sparse_dlm_attn_conformance import check_backend  # noqa: E402
from sparse_dlm_attn_flash import FlashAttentionBackend  # noqa: E402
from sparse_dlm_attn_flash.folding import folded  # noqa: E402

KERNELS = ("Planned", "Packed", "Paged")


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_keeps_the_specification(kernel: str) -> None:
    found = check_backend(
        getattr(stand_ins, kernel)(),
        clauses=("ATTEND-1", "BLOCK-1", "CONTEXT-2", "PURE-6"),
        dtypes=("float32",),
        first_only=True,
        shrink=False,
    )
    assert not found, found[0].text


def test_a_log_sum_exp_left_in_base_2_is_noticed() -> None:
    class Unconverted(stand_ins.Planned):
        def run(self, *arguments: Any) -> Any:
            out, lse = super().run(*arguments)
            return out, lse / math.log(2.0)

    assert check_backend(Unconverted(), clauses=("ATTEND-1",), dtypes=("float32",), first_only=True, shrink=False)


@pytest.mark.parametrize(
    ("owed", "kind"),
    [
        ("nothing", InvalidTypeError),
        ("no lse", InvalidTypeError),
        ("fewer channels", InvalidArgumentError),
        ("an axis too many", InvalidArgumentError),
        ("another device", InvalidArgumentError),
    ],
)
def test_a_kernel_that_returns_something_else_is_told_what_it_owes(owed: str, kind: type[Exception]) -> None:
    class Wrong(stand_ins.Planned):
        def run(self, *arguments: Any) -> Any:
            out, lse = super().run(*arguments)
            return {
                "nothing": None,
                "no lse": out,
                "fewer channels": (out[:, :3], lse),
                "an axis too many": (out, lse[:, None]),
                "another device": (out.to("meta"), lse),
            }[owed]

    q, k, v = (torch.randn(1, heads, 4, 16) for heads in (4, 2, 2))
    cache = torch.randn(2, 1, 2, 32, 16)
    said = "must return tensors on cpu.*meta" if owed == "another device" else "tensors out.*natural log"
    with pytest.raises(kind, match=rf"run\(\) of backend .*{said}"):
        PrefixAttention("dense", Wrong())(q, k, v, Context.from_dense(cache[0], cache[1], 16))


def test_a_build_says_what_it_was_made_without(monkeypatch: pytest.MonkeyPatch) -> None:
    interface, config = types.ModuleType("fa3_fwd_interface"), types.ModuleType("fa3_fwd_config")
    interface.flash_attn_varlen_func = stand_ins.flash_attn_varlen_func  # type: ignore[attr-defined]
    interface.flash_attn_with_kvcache = stand_ins.flash_attn_with_kvcache  # type: ignore[attr-defined]
    flags = {"FLASHATTENTION_DISABLE_FP16": True, "FLASHATTENTION_DISABLE_PAGEDKV": True}
    config.CONFIG = {"build_flags": flags}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", interface)
    monkeypatch.setitem(sys.modules, "fa3_fwd_config", config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backend = FlashAttentionBackend(module="fa3_fwd_interface")
    assert backend.capabilities.dtypes == ("bfloat16",)
    with pytest.raises(UnavailableError, match="built without paged KV"):
        FlashAttentionBackend("paged", module="fa3_fwd_interface")
    with pytest.raises(InvalidArgumentError, match="module must be one of"):
        FlashAttentionBackend(module="flash_attn_5")


@pytest.mark.parametrize("layout", ["HND", "NHD", "dense"])
def test_folding_views_every_layout_without_a_copy(layout: str) -> None:
    if layout == "dense":
        cache = torch.randn(2, 3, 8, 4)
        context = Context.from_dense(cache, cache.clone(), 2)
    else:
        pages = torch.randn(5, 3, 2, 4) if layout == "HND" else torch.randn(5, 2, 3, 4).transpose(1, 2)
        table = torch.arange(5, dtype=torch.int32)[None]
        context = Context(pages, pages, table, torch.full_like(table, 2))
    pool = folded(context, "any")
    assert pool.k.untyped_storage().data_ptr() == context.k_pages.untyped_storage().data_ptr()
    for page in context.page_table.flatten().tolist():
        for head in range(3):
            number = page * pool.page_step + head * pool.head_step
            assert torch.equal(pool.k[number], context.k_pages[page, head])
            assert torch.equal(pool.v[number], context.v_pages[page, head])


def test_keys_and_values_of_different_strides_are_refused() -> None:
    table = torch.zeros(1, 1, dtype=torch.int32)
    k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 4, 2, 8).transpose(1, 2)
    context = Context(k, v, table, table + 4)
    with pytest.raises(UnsupportedError, match="allocate both alike"):
        stand_ins.Planned().attend_pages(
            torch.randn(1, 2, 3, 8), context, Selection.all_pages(context, 3), torch.ones(1, 3, dtype=torch.bool)
        )


@pytest.mark.parametrize(
    ("name", "modules", "remedy"),
    [
        ("flash-attn", ("flash_attn", "flash_attn_interface", "fa3_fwd_interface"), "pip install flash-attn"),
        ("flashinfer", ("flashinfer",), "pip install flashinfer-python"),
    ],
)
def test_a_missing_library_is_named_with_the_remedy(
    name: str, modules: Any, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnavailableError, match=remedy):
        get_backend(name)


def test_which_gpu_and_which_of_flashinfers_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capability = {"cuda": (8, 0), "cuda:1": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.__getitem__)
    assert get_backend("flashinfer").kernel == "fa2"
    other = get_backend("flashinfer:device=cuda:1")
    assert (other.kernel, other.device) == ("fa3", "cuda:1")
    assert get_backend("flashinfer", device="cuda:1", kernel="fa2").kernel == "fa2"
    for arguments, rule in (
        ({"device": "cpu"}, "device must be 'cuda' or 'cuda:N'"),
        ({"device": "cuda:2"}, "device must name one of 2 GPUs"),
        ({"device": "cuda:x"}, "device must be 'cuda' or 'cuda:N'"),
        ({"kernel": "fa4"}, "kernel must be one of auto, fa2, fa3"),
    ):
        with pytest.raises(InvalidArgumentError, match=rule):
            get_backend("flashinfer", **arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="no usable GPU"):
        get_backend("flashinfer")
