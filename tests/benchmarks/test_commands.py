"""What the commands refuse, and what they print, write and draw; measuring is made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bench needs PyTorch")
pytest.importorskip("triton", reason="tuning is the Triton backend's")

from sparse_dlm_attn.cli import main  # noqa: E402
from sparse_dlm_attn_benchmarks import break_even, command  # noqa: E402
from sparse_dlm_attn_benchmarks.break_even import Point  # noqa: E402


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
    ],
)
def test_they_refuse_bad_input_and_then_a_machine_without_a_gpu(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_break_even_prints_writes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by it")

    def measured(shape: Any, policy: str, densities: Any, backend: Any, repeats: int, say: Any) -> list[Point]:
        say("a peer is not here")
        return [
            Point(
                shape.context, density, density, f"{policy}:budget=64", 1e3 * density, shape.context / 100, "SDPA", 1e-3
            )
            for density in densities
        ]

    monkeypatch.setattr(break_even, "measure_context", measured)
    for check in ("_need_gpu", "_check_backend"):
        monkeypatch.setattr(command, check, lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setenv("COLUMNS", "160")
    kept, drawn = tmp_path / "kept.json", tmp_path / "drawn.png"
    options = ["--contexts=16K,8K", "--densities=0.5,0.1", "--q-heads=16", "--backend=reference", "--repeats=3"]
    assert main(["break-even", *options, "--json", str(kept), "--plot", str(drawn)]) == 0
    printed = capsys.readouterr()
    assert "a peer is not here" in printed.err
    sentence = "losa beats the fastest dense kernel from 16K tokens on at 10% (1.64x) of the context read."
    assert sentence in printed.out and "0.82x (100.0 us)" in printed.out
    record = json.loads(kept.read_text())
    assert record["answer"] == sentence
    assert (record["device"], record["batch"], len(record["points"])) == ("a GPU", 1, 4)
    assert drawn.read_bytes().startswith(b"\x89PNG")
