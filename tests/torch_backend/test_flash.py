"""Dense parts by flash-attn: each version's module by name, through stand-ins with its public signature."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch backend needs PyTorch")

from sparse_dlm_attn import UnavailableError  # noqa: E402
from sparse_dlm_attn_torch import dense  # noqa: E402

Tensor = Any


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Compute as flash-attn does: ``(batch, tokens, heads, head_dim)``, LSE ``(batch, heads, tokens)``."""
    group = q.shape[2] // k.shape[2]
    rows, keys, values = q.transpose(1, 2), *(side.transpose(1, 2).repeat_interleave(group, 1) for side in (k, v))
    logits = rows @ keys.mT * (scale or q.shape[-1] ** -0.5)
    return (logits.softmax(-1) @ values).transpose(1, 2), logits.logsumexp(-1)


def version_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    out, lse = attention(q, k, v, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def version_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    out, lse = attention(q, k, v, softmax_scale)
    return (out, lse) if return_attn_probs else out


def version_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (None, None),
    softcap: float | None = None,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    out, lse = attention(q, k, v, softmax_scale)
    return out, lse if return_lse else None


VERSIONS = {
    "flash_attn_interface": version_3,
    "fa3_fwd_interface": version_3,
    "flash_attn.cute": version_4,
    "flash_attn": version_2,
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes these modules, and no others of flash-attn, importable."""

    def install(**functions: Any) -> None:
        for name in ("flash_attn", *VERSIONS):
            monkeypatch.setitem(sys.modules, name, None)
        for name, function in functions.items():
            if "." in name:
                monkeypatch.setitem(sys.modules, name.partition(".")[0], ModuleType("package"))
            module = ModuleType(name)
            module.flash_attn_func = function  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.mark.clause("BLOCK-1")
@pytest.mark.parametrize("name", VERSIONS)
def test_each_version_is_found_by_name_and_asked_for_its_lse(installed: Callable[..., None], name: str) -> None:
    installed(**{name: VERSIONS[name]})
    assert dense.flash_attention()[0] == name
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    out, lse = dense.attend_flash(q, k, v, 0.3)
    wanted, wanted_lse = dense.attend_dense(q, k, v, 0.3)
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-6, rtol=0)


@pytest.mark.clause("ERROR-1")
def test_a_version_without_lse_and_none_at_all_are_errors_that_name_the_remedy(installed: Callable[..., None]) -> None:
    q = torch.randn(1, 1, 2, 4)
    for silent in (
        lambda q, k, v, softmax_scale=None, causal=False: q,
        lambda q, k, v, softmax_scale=None, causal=False: (q, None),
    ):
        installed(flash_attn=silent)
        with pytest.raises(UnavailableError, match=r"returns no log-sum-exp.*Upgrade it"):
            dense.attend_flash(q, q, q, 1.0)
    installed()
    with pytest.raises(UnavailableError, match=r"fa3_fwd_interface: .*pass dense='matmul'"):
        dense.flash_attention()
