"""What the Triton backend refuses and declares, how its operators meet PyTorch, and the paths that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs PyTorch")
pytest.importorskip("triton", reason="the Triton backend needs Triton")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from sparse_dlm_attn import (  # noqa: E402
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PageBounds,
    PassInfo,
    PrefixAttention,
    Selection,
    SparseAttentionError,
    UnavailableError,
    UnsupportedError,
    get_backend,
)
from sparse_dlm_attn.capabilities import Problem  # noqa: E402
from sparse_dlm_attn.ranked import RankedPass  # noqa: E402
from sparse_dlm_attn_triton import TritonBackend, common, ops  # noqa: E402

# The interpreter computes with NumPy, which warns where a GPU has NaN and infinity as results.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BACKEND, RAGGED = TritonBackend(), TritonBackend(ragged=True)


def problem(tokens: int = 4, head_dim: int = 16, dtype: Any = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    pages = torch.randn(3, 1, 8, head_dim, device=DEVICE).to(dtype)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([[8, 8, 5]], dtype=torch.int32, device=DEVICE)
    block = [torch.randn(1, heads, tokens, head_dim, device=DEVICE).to(dtype) for heads in (2, 1, 1)]
    context = Context(pages, pages.clone(), table, lengths)
    return {
        "q": block[0],
        "k": block[1],
        "v": block[2],
        "context": context,
        "selection": Selection.all_pages(context, tokens),
        "active": torch.ones(1, tokens, dtype=torch.bool, device=DEVICE),
    }


def attend(backend: TritonBackend = BACKEND, **changed: Any) -> Any:
    values = {**problem(), **changed}
    names = ("q", "k", "v", "context", "selection", "active")
    return backend.attend(*(values[name] for name in names), None)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        (lambda: {"q": problem()["q"].cpu().numpy()}, SparseAttentionError, "as q is"),
        (lambda: problem(dtype=torch.float64), UnsupportedError, "float64"),
        (lambda: problem(head_dim=257), UnsupportedError, "head_dim 257 exceeds 256"),
        (lambda: {"k": problem()["k"].to("meta")}, SparseAttentionError, "device"),
        (lambda: {"q": problem()["q"].to("meta")}, SparseAttentionError, "device"),
        (lambda: {"active": torch.ones(1, 5, dtype=torch.bool, device=DEVICE)}, SparseAttentionError, "active"),
    ],
    ids=["library", "float64", "head-dim", "device-of-k", "device-of-q", "rows"],
)
def test_what_it_cannot_compute_is_refused(
    changed: Callable[[], dict[str, Any]], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        attend(**changed())


@pytest.mark.clause("ERROR-1")
def test_arrays_of_numpy_are_refused_as_a_whole() -> None:
    with pytest.raises(InvalidTypeError, match=r"must be a torch\.Tensor"):
        BACKEND.page_bounds(Context.from_dense(*np.zeros((2, 1, 1, 8, 4), np.float32), 4))


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("device", ["tpu", "mps", 3.5])
def test_a_device_that_it_cannot_use_is_refused(device: object) -> None:
    with pytest.raises(InvalidArgumentError, match="device"):
        TritonBackend(device=device)  # type: ignore[arg-type]


def test_the_interpreter_computes_on_the_cpu_alone() -> None:
    if DEVICE != "cpu":
        pytest.skip("a GPU is there: kernels are compiled")
    assert TritonBackend("cpu").device == "cpu"
    with pytest.raises(InvalidArgumentError, match="must be 'cpu' while TRITON_INTERPRET=1"):
        TritonBackend("cuda")


@pytest.mark.clause("ERROR-2")
def test_without_the_interpreter_a_cpu_is_refused() -> None:
    code = "from sparse_dlm_attn_triton import TritonBackend; TritonBackend('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert UnavailableError.__name__ in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


@pytest.mark.clause("ERROR-2")
def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "INTERPRETED", False)
    for number, have in enumerate([(7, 5), (8, 0), (9, 0)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, have=have: have)
        device = torch.device("cuda", 90 + number)  # answers are kept for each
        if have < (8, 0):
            with pytest.raises(UnavailableError, match=r"capability is 7\.5, and kernels need 8\.0.*torch"):
                common.uses_pdl(device)
        else:
            assert common.uses_pdl(device) == (have >= (9, 0))


@pytest.mark.clause("CAPS-1")
def test_capabilities_name_every_reason() -> None:
    declared = BACKEND.capabilities
    assert declared.devices == (DEVICE,)
    assert ("bfloat16" in declared.dtypes) == (DEVICE == "cuda")
    assert declared.deterministic
    assert BACKEND.why_not(Problem("float16", 80, 24, 7, 1, 200, DEVICE)) == []
    reasons = BACKEND.why_not(Problem("float64", 257, 300, 2, 1, 4, "tpu"))
    for part in ("dtype float64", "device tpu", "head_dim 257", "page_size 300"):
        assert any(part in reason for reason in reasons), reasons
    assert len(reasons) == 4


@pytest.mark.clause("CAPS-1")
def test_the_driver_refuses_what_is_not_declared() -> None:
    values = problem(dtype=torch.float64)
    attention = PrefixAttention("dense", BACKEND)
    with pytest.raises(UnsupportedError, match="dtype float64"):
        attention(values["q"], values["k"], values["v"], values["context"])


def operator_arguments() -> dict[str, tuple[Any, ...]]:
    """Return positional arguments of every custom operator."""
    given = problem()
    q, k, v, context = (given[name] for name in ("q", "k", "v", "context"))
    pages = (context.k_pages, context.v_pages, context.page_table, context.page_lengths)
    bounds: PageBounds = BACKEND.page_bounds(context)
    chosen = (given["selection"].mask, 4, given["active"])
    scores = BACKEND.page_scores(q, bounds)
    count = torch.full((1, 1, 1), 2, dtype=torch.int32, device=DEVICE)
    rule = (q + 1, 2, None, 8, 1)
    return {
        "page_bounds": (context.k_pages, *pages[2:]),
        "page_scores": (q, bounds.lower, bounds.upper),
        "top_pages": (scores, count, context.exists[:, None, None]),
        "attend_pages": (q, *pages, *chosen, 0.25),
        "attend_block": (q, k, v, 0.25),
        "attend": (q, k, v, *pages, *chosen, 0.25, q + 1, scores[..., 0].clone()),
        "attend_ranked": (q, k, v, *pages, bounds.lower, bounds.upper, *rule, "row", "queries", 0.25, None, None),
        "pooled_scores": (q, context.k_pages, *pages[2:], 3, 0.25, None),
    }


@pytest.mark.parametrize("name", ops.__all__)
def test_fakes_tell_the_real_shapes(name: str) -> None:
    arguments = operator_arguments()[name]
    real = getattr(ops, name)(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for part in arguments]
        told = getattr(ops, name)(*fakes)
    for got, want in zip(*((part,) if isinstance(part, torch.Tensor) else part for part in (told, real)), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize(("union", "keep"), [("kv_head", "nothing"), ("query_head", "active_queries")])
def test_fakes_of_ranked_passes_follow_the_rule(union: str, keep: str) -> None:
    arguments = list(operator_arguments()["attend_ranked"])
    arguments[14:16] = union, keep
    real = ops.attend_ranked(*arguments)
    with FakeTensorMode() as mode:
        told = ops.attend_ranked(
            *(mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for part in arguments)
        )
    assert [part.shape for part in told] == [part.shape for part in real]


@pytest.mark.parametrize("name", ["page_scores", "attend_ranked"])
def test_the_operator_is_registered_as_pytorch_asks(name: str) -> None:
    operator = getattr(torch.ops.sparse_dlm_attn_triton, name).default
    torch.library.opcheck(operator, operator_arguments()[name])


@pytest.mark.clause("RANKED-1")
@pytest.mark.parametrize("policy", ["losa:budget=8,active=2", "quest:budget=8"])
def test_the_driver_takes_the_ranked_path(policy: str) -> None:
    asked: list[RankedPass] = []

    class Watching(TritonBackend):
        def attend_ranked(self, *arguments: Any, **options: Any) -> Any:
            asked.append(arguments[5])
            return super().attend_ranked(*arguments, **options)

        def top_pages(self, *arguments: Any, **options: Any) -> Any:
            raise AssertionError("a pass that is ranked asks for no operator of its own")

    attention, memory, values = PrefixAttention(policy, Watching()), None, problem()
    if policy.startswith("losa"):  # whose pass 0 has nothing to measure change against
        _, memory = PrefixAttention(policy, BACKEND)(
            values["q"], values["k"], values["v"], values["context"], None, PassInfo(0)
        )
    out, memory = attention(values["q"] + 1, values["k"], values["v"], values["context"], memory, PassInfo(1))
    assert len(asked) == 1
    assert asked[0].pages == 1
    assert memory.traffic.metadata_reads == 1
    assert out.shape == values["q"].shape
    assert np.isfinite(out.cpu().numpy()).all()


def batch(tokens: int = 12) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Any:
        return torch.randn(sizes, generator=generator).to(DEVICE)

    pages = normal(12, 1, 16, 16)
    table = torch.arange(12, dtype=torch.int32).view(2, 6).to(DEVICE)
    lengths = torch.tensor([[16] * 6, [16, 3, 0, 0, 0, 0]], dtype=torch.int32, device=DEVICE)
    return {
        "q": normal(2, 2, tokens, 16),
        "k": normal(2, 1, tokens, 16),
        "v": normal(2, 1, tokens, 16),
        "context": Context(pages, pages + 1, table, lengths),
    }


def test_stream_k_computes_what_split_kv_computes_where_programs_look_for_the_few_active_rows() -> None:
    outs = []
    for backend in (BACKEND, RAGGED):
        attention, memory, values = PrefixAttention("losa:budget=32,active=3", backend), None, batch()
        for index in range(2):
            q = values["q"] + index * torch.linspace(0, 1, 12, device=DEVICE)[:, None]
            out, memory = attention(q, values["k"], values["v"], values["context"], memory, PassInfo(index))
        outs.append(out)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_ragged_is_an_option_of_the_name() -> None:
    assert get_backend("triton:ragged=true").ragged is True
    assert "ragged" in RAGGED.capabilities.notes
    assert "ragged=True" in repr(RAGGED)
    with pytest.raises(InvalidTypeError, match="ragged must be a bool"):
        TritonBackend(ragged="yes")  # type: ignore[arg-type]
