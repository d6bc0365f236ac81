"""Launch settings: what is valid, where they are kept, which a launch gets, and how they are found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs PyTorch")
pytest.importorskip("triton", reason="the Triton backend needs Triton")

from sparse_dlm_attn import (  # noqa: E402
    InvalidArgumentError,
    InvalidTypeError,
    PassInfo,
    PrefixAttention,
    UnavailableError,
    get_backend,
)
from sparse_dlm_attn.errors import DataFileError  # noqa: E402
from sparse_dlm_attn_benchmarks import tuning  # noqa: E402
from sparse_dlm_attn_benchmarks.gate import WrongResultError  # noqa: E402
from sparse_dlm_attn_benchmarks.layer import layers  # noqa: E402
from sparse_dlm_attn_benchmarks.shape import Shape  # noqa: E402
from sparse_dlm_attn_triton import TritonBackend, common, settings  # noqa: E402
from sparse_dlm_attn_triton.settings import Entry, Kind, Machine, Settings  # noqa: E402

HERE = Machine("a GPU", "3.6.0", "abc")
KIND = Kind("bfloat16", 128, 64, 4, 16, 8, 65536)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep settings here, take this machine for one with a GPU, and forget afterwards."""
    monkeypatch.setenv("SDA_TRITON_SETTINGS", str(tmp_path / "kept.json"))
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device=None: HERE))
    settings.nearest.cache_clear()
    yield tmp_path / "kept.json"
    settings._tuned.clear()
    settings.nearest.cache_clear()


def entry(kind: Kind = KIND, machine: Machine = HERE, **values: int) -> Entry:
    return Entry(machine, kind, Settings(**values), 30.0, 20.0)


@pytest.mark.parametrize(
    "values",
    [{"block_n": 48}, {"block_n": 8}, {"warps": 3}, {"warps": 32}, {"stages": 0}, {"programs": 0}, {"least_m": 256}],
)
def test_values_that_no_kernel_takes_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Settings(**values)
    assert caught.value.argument == next(iter(values))


def test_a_value_has_to_be_an_int() -> None:
    with pytest.raises(InvalidTypeError):
        Settings(stages=2.5)  # type: ignore[arg-type]


def test_what_is_stored_is_loaded_and_replaced_by_the_next_of_its_kind(file: Path) -> None:
    assert settings.load(file) == []
    other = replace(KIND, context=1024)
    settings.store(file, [entry(), entry(other, warps=8)])
    settings.store(file, [entry(stages=2)])
    assert settings.load(file) == [entry(stages=2), entry(other, warps=8)]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "entries": []}', "{", b"\xff"])
def test_a_file_of_something_else_is_said_and_kept(file: Path, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(data)
    with pytest.raises(DataFileError, match=r"kept\.json"):
        settings.load(file)
    with pytest.raises(DataFileError):
        settings.store(file, [entry()])
    assert file.read_bytes() == data


def test_the_file_lies_in_the_users_cache_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SDA_TRITON_SETTINGS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.cache_file() == tmp_path / "sparse_dlm_attn" / "triton.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert settings.cache_file().is_relative_to(Path.home() / ".cache")
    settings.make_room(tmp_path / "named.json")
    with pytest.raises(DataFileError, match="does not exist"):
        settings.make_room(tmp_path / "nowhere" / "named.json")


def test_a_launch_gets_its_default_unless_tuned_settings_were_asked_for(file: Path) -> None:
    settings.store(file, [entry(stages=1)])
    sizes = (None, torch.bfloat16, 128, 64, 4, 16, 8, 65536)
    assert settings.chosen(Settings(), *sizes) == Settings()
    settings.use_tuned()
    assert settings.chosen(Settings(), *sizes) == Settings(stages=1)
    with settings.watched() as seen, settings.forced(Settings(warps=8)):
        assert settings.chosen(Settings(), *sizes) == Settings(warps=8)
    assert seen == [Settings()]


def test_the_nearest_batch_and_context_are_taken_and_nothing_else(file: Path) -> None:
    settings.store(
        file, [entry(stages=1), entry(replace(KIND, context=4096), stages=2), entry(replace(KIND, heads=64), stages=4)]
    )
    settings.use_tuned()
    for heads, context, stages in ((8, 32768, 1), (8, 8192, 2), (48, 65536, 4), (1, 1, 2)):
        asked = replace(KIND, heads=heads, context=context)
        assert settings.nearest(None, asked).stages == stages, asked
    with pytest.raises(UnavailableError) as caught:
        settings.nearest(None, replace(KIND, head_dim=64))
    assert "none for dtype=bfloat16, head_dim=64, page_size=64, group=4, tokens=16" in str(caught.value)
    assert "sparse-dlm-attn tune --dtype bfloat16 --head-dim 64" in str(caught.value)


@pytest.mark.parametrize(
    "machine", [None, replace(HERE, gpu="another"), replace(HERE, triton="3.5.0"), replace(HERE, kernels="old")]
)
def test_what_was_tuned_elsewhere_is_not_used(file: Path, machine: Machine | None) -> None:
    if machine is not None:
        settings.store(file, [entry(machine=machine)])
    with pytest.raises(UnavailableError, match="Run: sparse-dlm-attn tune"):
        settings.use_tuned()


def test_tuned_is_an_option_of_the_backend() -> None:
    with pytest.raises(InvalidTypeError, match="tuned must be a bool or None"):
        TritonBackend(tuned=1)  # type: ignore[arg-type]
    if common.INTERPRETED:
        with pytest.raises(InvalidArgumentError, match="tuned must be False under TRITON_INTERPRET"):
            get_backend("triton:tuned=true")


@pytest.mark.skipif(not common.INTERPRETED, reason="tests/gpu has this one for GPUs")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_settings_reach_the_kernel_and_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(context=64, tokens=3, q_heads=4, kv_heads=2, head_dim=16, page_size=16, dtype="float32")
    monkeypatch.setattr("sparse_dlm_attn_benchmarks.layer.COLD_BYTES", 1)
    backend = TritonBackend()
    one = layers(shape, backend, device="cpu")[0]
    attention = PrefixAttention("dense", backend)

    def run() -> Any:
        return attention(one.q, one.k, one.v, one.context, None, PassInfo(0))[0]

    with settings.watched() as defaults:
        wanted = run()
    assert defaults == [Settings(block_n=32, programs=8)]
    with settings.forced(Settings(block_n=16, programs=1)):
        got = run()
    plain = PrefixAttention("dense", "torch")(one.q, one.k, one.v, one.context, None, PassInfo(0))[0]
    for out in (got, wanted):
        torch.testing.assert_close(out, plain, atol=1e-6, rtol=0)


def clock(settings: Settings) -> float | None:
    """Take 10 us, and more for everything that is not as it should be; 8 warps do not run."""
    if settings.warps == 8:
        return None
    return 10.0 + 3 * (settings.block_n != 128) + 2 * (settings.stages != 2) + (settings.programs != 400)


def test_the_search_finds_the_fastest_settings() -> None:
    asked: list[Settings] = []

    def timed(one: Settings) -> float | None:
        asked.append(one)
        return clock(one)

    best, spent, before = tuning.search(Settings(), 100, 40, timed)
    assert (best.block_n, best.stages, best.programs, best.warps) == (128, 2, 400, 4)
    assert (spent, before) == (10.0, 16.0)
    assert len(asked) == len(set(asked)) <= 40


def test_the_search_keeps_to_its_limit_and_to_the_default_where_nothing_is_gained() -> None:
    asked: list[Settings] = []

    def same(one: Settings) -> float:
        asked.append(one)
        return 20.0 if len(asked) == 1 else 19.9  # half a percent is noise

    best, spent, before = tuning.search(Settings(), 132, 5, same)
    assert (best, spent, before) == (Settings(), 20.0, 20.0)
    assert len(asked) == 5


def test_defaults_that_do_not_run_are_an_error() -> None:
    with pytest.raises(WrongResultError):
        tuning.search(Settings(warps=8), 100, 40, clock)
