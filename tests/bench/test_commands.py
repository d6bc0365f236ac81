"""What the commands refuse, and what they print, write and draw of results; measuring itself is made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bench needs PyTorch")
pytest.importorskip("triton", reason="tuning is the Triton backend's")

from sparse_dlm_attn import Backend  # noqa: E402
from sparse_dlm_attn.cli import main  # noqa: E402
from sparse_dlm_attn_bench import break_even, command, tuning  # noqa: E402
from sparse_dlm_attn_bench.break_even import Point  # noqa: E402
from sparse_dlm_attn_triton import settings  # noqa: E402
from sparse_dlm_attn_triton.settings import Entry, Machine, Settings  # noqa: E402


@pytest.mark.parametrize(("arguments", "message"), [
    ("break-even --contexts 16K,x", "--contexts must be numbers of tokens as in 16K,32768"),
    ("break-even --contexts 100", "--contexts must be a multiple of page_size=64 tokens; got 100"),
    ("break-even --page-size 48", "Change it or --page-size."),
    ("break-even --densities 0.1,1.5", "--densities must be shares over 0 and at most 1"),
    ("break-even --q-heads 30", "--q-heads must be a multiple of kv_heads=8; got 30"),
    ("break-even --dtype int8", "--dtype must be bfloat16, float16 or float32"),
    ("break-even --policy dense", "unknown parameter of policy 'dense' 'budget'"),
    ("break-even --policy losa:budget=64", "--policy must leave its budget out"),
    ("break-even --repeats 0", "--repeats must lie in 1..10000"),
    ("break-even --json missing/out.json", "the directory of 'missing/out.json' does not exist"),
    ("tune --limit 0", "--limit must lie in 1..500"),
    ("tune --batch 0", "--batch must be at least 1"),
    ("break-even", "no usable GPU"),
    ("tune", "no usable GPU"),
])
def test_they_refuse_bad_input_and_then_a_machine_without_a_gpu(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is always there, and any backend that serves it."""
    monkeypatch.setattr(command, "_need_gpu", lambda name: None)
    monkeypatch.setattr(command, "_check_backend", lambda backend, shape: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.usefixtures("pretend")
def test_break_even_prints_writes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by it")
    asked = []

    def measured(shape: Any, policy: str, densities: Any, backend: Backend, repeats: int, say: Any) -> list[Point]:
        asked.append((shape.context, shape.q_heads, policy, tuple(densities), backend.name, repeats))
        say("a peer is not here")
        return [Point(shape.context, density, density, f"{policy}:budget=64", 1e3 * density,
                      shape.context / 100, "SDPA", 1e-3) for density in densities]

    monkeypatch.setattr(break_even, "measure_context", measured)
    kept, drawn = tmp_path / "kept.json", tmp_path / "drawn.png"
    assert main([
        "break-even", "--contexts", "16K,8K", "--densities", "0.5,0.1", "--q-heads", "16", "--backend",
        "reference", "--repeats", "3", "--json", str(kept), "--plot", str(drawn),
    ]) == 0
    printed = capsys.readouterr()
    assert asked == [(8192, 16, "losa", (0.1, 0.5), "reference", 3), (16384, 16, "losa", (0.1, 0.5), "reference", 3)]
    assert "a peer is not here" in printed.err
    sentence = ("losa beats the fastest dense kernel from 16K tokens on at 10% (1.64x) of the context read.")
    assert sentence in printed.out
    assert "0.82x (100.0 us)" in printed.out
    record = json.loads(kept.read_text())
    assert record["answer"] == sentence
    assert (record["device"], record["batch"], len(record["points"])) == ("a GPU", 1, 4)
    assert "context" not in record
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("pretend")
def test_tune_keeps_what_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tuned(shape: Any, policy: str, backend: Backend, limit: int, repeats: int, step: Any) -> Entry:
        assert (policy, limit, repeats) == ("quest", 7, 4)
        step()
        return Entry(Machine("a GPU", "3", "x"), tuning.kind_of(shape), Settings(warps=8), 30.0, 25.0)

    monkeypatch.setattr(tuning, "tune_shape", tuned)
    monkeypatch.setattr(command, "find_backend", lambda name: None)
    kept = tmp_path / "kept.json"
    assert main(["tune", "--contexts", "8K,16K", "--policy", "quest", "--limit", "7", "--repeats", "4",
                 "--batch", "2", "--file", str(kept)]) == 0
    assert "triton:tuned=true" in capsys.readouterr().out
    entries = settings.load(kept)
    assert [(entry.kind.context, entry.kind.heads, entry.settings.warps) for entry in entries] == [
        (8192, 16, 8), (16384, 16, 8)
    ]
    assert main(["tune", "--show", "--file", str(kept)]) == 0
    assert [Entry.of(record) for record in json.loads(capsys.readouterr().out)] == entries
