"""`evaluate`: scores, processes, the table of whole sequences, and every kind of bad input."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., tuple[str, str]]
pytestmark = pytest.mark.usefixtures("in_an_empty_directory")
SHORT = ("--task", "single-key", "--length", "256")


QUICK = ("--length", "256", "--prompts", "1", "--task", "single-key", "--budget", "64", "--workers", "1")


def test_evaluate_writes_scores_parameters_and_versions(call: Call, tmp_path: Path) -> None:
    out, err = call("evaluate", *QUICK, "--policy", "losa", "--policy", "flashblock", "--json")
    scores = json.loads(out)
    assert [score["policy"] for score in scores] == ["dense", "losa:budget=64", "flashblock"]
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["scores"] == scores
    assert report["scores"][1]["parameters"]["active"] == 5
    assert report["evaluation"]["seed"] == 0 and report["environment"]["numpy"]
    assert len(report["prompts"]) == 1 and len(report["prompts"][0]["results"]) == 3
    assert "seeds from 0" in err
    assert os.listdir(tmp_path) == ["evaluation.json"], "a picture is drawn on request only"


def test_evaluate_gives_the_same_scores_with_several_processes(call: Call, tmp_path: Path) -> None:
    def scores(workers: str) -> list[dict[str, Any]]:
        call(
            "evaluate",
            "--length",
            "256",
            "--prompts",
            "2",
            "--task",
            "single-key",
            "--budget",
            "64",
            "--policy",
            "losa",
            "--workers",
            workers,
            "--out",
            f"{workers}.json",
        )
        found = json.loads((tmp_path / f"{workers}.json").read_text())["scores"]
        return [{key: value for key, value in score.items() if key != "seconds"} for score in found]

    assert scores("1") == scores("2")


def test_evaluate_exits_with_1_below_what_was_required(call: Call, tmp_path: Path) -> None:
    call("evaluate", *QUICK, "--policy", "dense", "--require", "dense=0")
    # The window cannot hold the fact, so no model answers exactly through it except by chance.
    _, err = call(
        "evaluate",
        *QUICK,
        "--seed",
        "5",
        "--policy",
        "sliding-window:window=1",
        "--require",
        "sliding-window:window=1=1",
        code=1,
    )
    assert "required 100 %" in err
    assert (tmp_path / "evaluation.json").exists(), "the report is written all the same"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "0"], "--prompts must be at least 1; got 0"),
        (["--prompts", "1000000000"], "--prompts must be at most 10000"),
        (["--workers", "-1"], "--workers must be at least 1"),
        (["--task", "singlekey"], "did you mean 'single-key'?"),
        (["--length", "100"], "--length must be a positive multiple of block_length=16; got 100"),
        (["--length", "32768"], "at most 16384"),
        (["--require", "dense"], "--require must be written POLICY=SHARE"),
        (["--require", "dense=2"], "--require must lie in 0..1"),
        (["--require", "sparse=0.5"], "unknown policy in --require 'sparse'"),
        (["--out", "missing/evaluation.json"], "does not exist"),
        (["--out", "."], "is a directory"),
        (["--plot", "missing/picture.png"], "--plot: the directory of"),
        (["--weights", "missing.safetensors"], "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_refuses_bad_input_before_any_work(
    call: Call, tmp_path: Path, options: list[str], message: str
) -> None:
    out, err = call("evaluate", *options, code=2)
    assert out == "" and message in " ".join(err.split())
    assert os.listdir(tmp_path) == []


def test_the_table_of_whole_sequences_is_numbers_json_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    table = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "sparsed_table.py"))
    for name, value in {"TASKS": ("chained",), "STEPS": 4}.items():  # a third of the time
        monkeypatch.setitem(table["run"].__globals__, name, value)
    options = ("--prompts", "1", "--lengths", "272", "--out", "t.json", "--plot", "p.png")
    monkeypatch.setattr(sys, "argv", ["sparsed_table.py", *options])
    table["main"]()
    cells = {cell["label"]: cell for cell in json.loads((tmp_path / "t.json").read_text())["cells"]}
    assert (cells["dense"]["exact"], cells["dense"]["pair_share"], cells["dense"]["row_share"]) == (1, 1, 1)
    assert cells["Fast-dLLM, dual"]["row_share"] <= cells["Fast-dLLM, prefix"]["row_share"] < 1
    assert cells["SparseD"]["row_share"] == 1 > cells["SparseD"]["pair_share"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@contextlib.contextmanager
def evaluating(folder: Path, workers: str) -> Iterator[subprocess.Popen[str]]:
    """Start a long evaluation in a group of its own, which ends with the test whatever happens."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sparse_dlm_attn",
            "evaluate",
            "--length",
            "4096",
            "--prompts",
            "50",
            "--workers",
            workers,
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        # Tests that run in the background of a shell inherit that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_evaluation_ends_at_once_and_leaves_nothing(tmp_path: Path, workers: str) -> None:
    with evaluating(tmp_path, workers) as process:
        assert process.stderr is not None
        assert "100 prompts" in process.stderr.readline()
        time.sleep(2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_workers_end_when_the_evaluation_is_killed(tmp_path: Path) -> None:
    with evaluating(tmp_path, "2") as process:
        assert process.stderr is not None
        assert "2 processes" in process.stderr.readline()
        time.sleep(2)  # by now the workers run
        process.kill()
        process.wait()
        process.stderr.close()
        deadline = time.monotonic() + 30
        with pytest.raises(ProcessLookupError):  # nobody is left in the group
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.1)


def torch_options(command: str) -> tuple[str, ...]:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    own = ("--json",) if command == "decode" else ("--prompts", "1", "--workers", "1", "--out", "found.json")
    return (command, *SHORT, "--policy", "losa", "--budget", "64", "--steps", "1", *own)


@pytest.mark.parametrize("command", ["decode", "evaluate"])
@pytest.mark.parametrize(
    ("backend", "path"), [("torch", "gather"), ("torch:attention=masked", "masked"), ("reference", "reference")]
)
def test_results_say_which_path_the_backend_took(command: str, backend: str, path: str, call: Call) -> None:
    device = ("--device", "cpu") if backend != "reference" else ()
    out, _ = call(*torch_options(command), "--backend", backend, *device)
    text = out if command == "decode" else Path("found.json").read_text(encoding="utf-8")
    environment = json.loads(text)["environment"]
    assert environment["attention_path"] == path
    assert environment["backend_notes"]
    assert device == () or environment["backend"].endswith("device=cpu")


@pytest.mark.clause("ERROR-1")
def test_a_device_that_is_not_there_is_an_error_with_a_remedy(call: Call) -> None:
    options = torch_options("decode")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    _, problem = call(*options, "--backend", "torch", "--device", "cuda", code=2)
    assert "on device 'cuda'" in problem and "use device='cpu'" in problem
    _, problem = call(*options, "--backend", "torch", "--device", "gpu", code=2)
    assert "must be 'cpu', 'cuda' or 'cuda:<number>'" in problem
