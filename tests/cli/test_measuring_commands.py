"""`break-even` and `tune`: what they refuse before anything is measured. Nothing here needs a GPU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_dlm_attn.cli import main

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("arguments, message", [
    (("break-even", "--contexts", "16K,x"), "--contexts must be numbers of tokens as in 16K,32768"),
    (("break-even", "--contexts", "100"), "--contexts must be a multiple of page_size=64 tokens; got 100"),
    (("break-even", "--page-size", "48"), "Change it or --page-size."),
    (("break-even", "--kv-heads", "5"), "must be a multiple of kv_heads=5; got 32. Change it or --kv-heads."),
    (("break-even", "--densities", "0.1,1.5"), "--densities must be shares over 0 and at most 1"),
    (("break-even", "--densities", "nan"), "--densities must be shares over 0 and at most 1"),
    (("break-even", "--q-heads", "30"), "--q-heads must be a multiple of kv_heads=8; got 30"),
    (("break-even", "--dtype", "int8"), "--dtype must be bfloat16, float16 or float32"),
    (("break-even", "--policy", "lossa"), "did you mean 'losa'?"),
    (("break-even", "--policy", "dense"), "unknown parameter of policy 'dense' 'budget'"),
    (("break-even", "--policy", "losa:budget=64"), "--policy must leave its budget out"),
    (("break-even", "--repeats", "0"), "--repeats must lie in 1..10000"),
    (("break-even", "--json", "missing/out.json"), "the directory of 'missing/out.json' does not exist"),
    (("tune", "--limit", "0"), "--limit must lie in 1..500"),
    (("tune", "--batch", "0"), "--batch must be at least 1"),
])
def test_bad_input_is_refused_before_a_gpu_is_looked_for(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("command", ["break-even", "tune"])
def test_without_a_gpu_they_say_what_they_need(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch", reason="without PyTorch it is missed first")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command]) == 2
    said = capsys.readouterr().err
    assert f"command '{command}'" in said
    assert "no usable GPU" in said
    assert "nvidia-smi" in said


def test_without_pytorch_they_say_how_to_install_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no PyTorch here')\n")
    result = run("tune", "--show", code=2, cwd=tmp_path)
    assert "pip install 'sparse_dlm_attn[triton]'" in result.stderr


def test_kept_settings_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="the settings are the Triton backend's")
    assert main(["tune", "--show", "--file", str(tmp_path / "none.json")]) == 0
    assert json.loads(capsys.readouterr().out) == []
    (tmp_path / "bad.json").write_text("{}")
    assert main(["tune", "--show", "--file", str(tmp_path / "bad.json")]) == 2
    assert "does not hold settings" in capsys.readouterr().err
