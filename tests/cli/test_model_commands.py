"""`decode`, `show` and `evaluate`: output, options, and every kind of bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sparse_dlm_attn_tiny
from sparse_dlm_attn.cli import main
from sparse_dlm_attn_tiny import tables

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SHORT = ("--task", "single-key", "--length", "256")
SHIPPED = Path(sparse_dlm_attn_tiny.__file__).parent / "data" / "tiny.safetensors"


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("SDA_TRACEBACK", raising=False)
    yield


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Return a function that runs the program in this process and returns (stdout, stderr)."""

    def run_here(*arguments: str, code: int = 0) -> tuple[str, str]:
        result = main(arguments)
        captured = capsys.readouterr()
        assert result == code, captured.err
        assert "Traceback" not in captured.err
        return captured.out, captured.err

    return run_here


Call = Callable[..., tuple[str, str]]


def test_decode_prints_a_table_with_every_default_policy(call: Call) -> None:
    out, _ = call("decode", *SHORT)
    budgeted = ("losa:", "quest:", "sliding-window:", "streaming-llm:", "mage:")
    assert all(name in out for name in ("dense", "flashblock", "sparsed", *budgeted))
    assert "What is the code of" in out and "expected" in out


def test_json_stands_alone_on_standard_output_and_accounts_for_every_byte(run: Run) -> None:
    chosen = ("--policy", "losa", "--policy", "sliding-window", "--budget", "64")
    result = run("decode", *SHORT, *chosen, "--json")
    report = json.loads(result.stdout)
    assert [r["policy"] for r in report["results"]] == ["dense", "losa:budget=64", "sliding-window:window=64"]
    dense, losa, window = (r["reads"] for r in report["results"])
    assert dense["everything"]["byte_share"] == 1.0
    context, passes = 256 * 2 * 8, report["results"][0]["passes"]  # bytes of text x KV heads x layers
    assert dense["everything"]["context_tokens"] == context * passes
    assert dense["everything"]["bytes_read"] == context * passes * 2 * 64 * 4  # K and V, head_dim, float32
    assert window["everything"]["density"] == 64 / 256
    for part in ("everything", "after_first_pass"):
        reads = losa[part]
        assert reads["bytes_read"] == reads["page_bytes"] + reads["metadata_bytes"] + reads["build_bytes"]
        assert reads["metadata_bytes"] > 0
    assert losa["everything"]["passes"] - losa["after_first_pass"]["passes"] == 1
    assert losa["after_first_pass"]["density"] < losa["everything"]["density"] < 1
    assert report["environment"]["weights_sha256"] and report["prompt"]["sha256"]


def test_a_prompt_can_be_a_file_or_standard_input(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The code of Rimon is 48213. " + "There she blows! " * 20
    (tmp_path / "prompt.txt").write_text(text)
    question = ("--question", "What is the code of Rimon?", "--answer", "48213.")
    options = (*question, "--policy", "dense", "--json")
    from_file = json.loads(call("decode", "--prompt", "prompt.txt", *options)[0])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    from_stdin = json.loads(call("decode", "--prompt", "-", *options)[0])
    assert from_file["prompt"]["sha256"] == from_stdin["prompt"]["sha256"]
    assert from_file["results"][0]["answer"] == from_stdin["results"][0]["answer"]
    assert from_file["results"][0]["exact"] in (True, False)


def test_a_prompt_without_question_is_continued_and_not_judged(call: Call, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Call me Ishmael. Some years ago")
    report = json.loads(
        call("decode", "--prompt", "prompt.txt", "--max-blocks", "1", "--policy", "dense", "--json")[0]
    )
    assert report["results"][0]["exact"] is None
    assert report["results"][0]["blocks"] == 1


def test_a_budget_above_the_context_reads_everything(call: Call) -> None:
    out, _ = call("decode", *SHORT, "--policy", "quest", "--budget", "1000000000000", "--json")
    dense, quest = json.loads(out)["results"]
    assert quest["reads"]["everything"]["density"] == 1.0
    assert quest["answer"] == dense["answer"] and quest["agreement"] == 1.0


def test_the_number_of_passes_follows_steps(call: Call) -> None:
    for steps in (1, 4):
        out, _ = call("decode", *SHORT, "--policy", "dense", "--steps", str(steps), "--json")
        assert json.loads(out)["results"][0]["passes"] == steps + 1, "the save pass comes on top"


def test_decoding_over_the_full_sequence(call: Call) -> None:
    out, _ = call("decode", "--full-sequence", *SHORT, "--json")
    dense = json.loads(out)["full_sequence"]
    assert (dense["policy"], dense["passes"], dense["row_share"], dense["pair_share"]) == ("dense", 8, 1, 1)
    out, _ = call("decode", "--full-sequence", "--policy", "fast-dllm", *SHORT, "--json")
    cached = json.loads(out)["full_sequence"]
    assert (cached["policy"], cached["passes"]) == ("fast-dllm", 8)
    assert cached["row_share"] == pytest.approx(cached["pair_share"])
    assert cached["row_share"] < 0.5
    out, _ = call("decode", "--full-sequence", "--policy", "sparsed:span=16", *SHORT)
    assert "% of the row-key pairs" in out


def test_the_demonstration_tells_its_story(call: Call) -> None:
    out, _ = call(
        "decode", "--policy", "losa", "--policy", "quest", "--policy", "sliding-window", "--policy",
        "streaming-llm", "--json",
    )
    report = json.loads(out)
    assert report["prompt"]["bytes"] == 4096
    exact = {result["name"]: result["exact"] for result in report["results"]}
    assert exact == {
        "dense": True, "losa": True, "quest": True, "sliding-window": False, "streaming-llm": False,
    }
    shares = {r["name"]: r["reads"]["everything"]["byte_share"] for r in report["results"]}
    assert shares["losa"] < 0.5 and shares["quest"] < 0.5


BAD_OPTIONS: list[tuple[list[str], str]] = [
    (["--policy", "lossa"], "did you mean 'losa'?"),
    (["--policy", "losa:buget=3"], "did you mean 'budget'?"),
    (["--policy", "losa:budget=0"], "budget must be at least 1; got 0"),
    (["--policy", "losa:budget=many"], "budget must be an int"),
    (["--policy", "losa:active=-1"], "active must be at least 0; got -1"),
    (["--policy", "losa:budget"], "--policy"),
    (["--policy", ""], "--policy"),
    (["--policy", "no_such_module:Policy"], "no_such_module"),
    (["--backend", "referense"], "did you mean 'reference'?"),
    (["--budget", "0"], "--budget must be at least 1; got 0"),
    (["--budget", "-5"], "--budget must be at least 1; got -5"),
    (["--budget", "much"], "--budget"),
    (["--task", "multi_key"], "did you mean 'multi-key'?"),
    (["--length", "100"], "--length"),
    (["--length", "-16"], "--length"),
    (["--length", "32"], "--length"),
    (["--length", "16400"], "at most 16384"),
    (["--length", "99999999999999999999"], "--"),
    (["--steps", "4", "--threshold", "0.9"], "--steps must not be given together with --threshold"),
    (["--steps", "0"], "steps must be at least 1; got 0"),
    (["--steps", "-3"], "steps must be at least 1; got -3"),
    (["--steps", "17"], "steps must be at most 16"),
    (["--threshold", "1.5"], "--threshold must lie in 0..1; got 1.5"),
    (["--threshold", "nan"], "--threshold must lie in 0..1; got nan"),
    (["--block-length", "7"], "block_length must be one of 8, 16, 32"),
    (["--block-length", "-8"], "--block-length must be at least 1; got -8"),
    (["--page-size", "0"], "--page-size must be at least 1; got 0"),
    (["--page-size", "1000000000"], "--page-size must be at most 16384"),
    (["--max-blocks", "0"], "--max-blocks must be at least 1; got 0"),
    (["--max-blocks", "1000000000"], "--max-blocks must be at most 1024"),
    (["--weights", "missing.safetensors"], "no such file"),
    (["--weights", "."], "directory"),
    (["--no-such-option"], "--no-such-option"),
    (["stray"], "stray"),
    (["--question", "Who?"], "--question needs --prompt"),
    (["--prompt", "missing.txt"], "cannot read 'missing.txt'"),
    (["--prompt", "."], "directory"),
    (["--prompt", "empty.txt"], "at least 1 byte"),
    (["--prompt", "latin.txt"], "not UTF-8 text (byte 0xe9 at offset 3)"),
    (["--prompt", "long.txt"], "at most 16384 bytes"),
    (["--prompt", "/dev/zero"], "at most 16384 bytes"),
    (["--prompt", "whale.txt", "--question", " "], "--question must not be empty"),
    (["--prompt", "whale.txt", "--seed", "3"], "--seed must not be given together with --prompt"),
]


@pytest.mark.clause("ERROR-1", "ERROR-2")
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[" ".join(o) for o, _ in BAD_OPTIONS])
def test_bad_input_is_one_clear_message_and_exit_code_2(
    call: Call, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "whale.txt").write_text("whale")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_bytes(b"x" * 16385)
    before = sorted(os.listdir(tmp_path))
    out, err = call("decode", *options, code=2)
    assert out == ""
    assert message in " ".join(err.split())
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_an_unreadable_file_is_refused(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("whale")
    path.chmod(0)
    assert "Permission denied" in call("decode", "--prompt", "secret.txt", code=2)[1]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "one byte of the header"])
def test_corrupt_weights_are_refused(call: Call, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.safetensors"
    if damage == "truncated":
        shutil.copy(SHIPPED, path)
        os.truncate(path, SHIPPED.stat().st_size // 2)
    elif damage == "one byte of the header":
        path.write_bytes(SHIPPED.read_bytes()[:8] + b"\x00" + SHIPPED.read_bytes()[9:])
    else:
        path.write_bytes(b"not a model" * 100 if damage == "garbage" else b"")
    out, err = call("decode", "--weights", str(path), code=2)
    assert "cannot read the model weights" in err and path.name in err
    assert out == ""


def test_closed_standard_input_is_reported() -> None:
    command = f"exec {sys.executable} -m sparse_dlm_attn decode --prompt - <&-"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "cannot read standard input: it is closed" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk_is_reported(call: Call, run: Run) -> None:
    _, err = call("show", *SHORT, "--policy", "dense", "--out", "/dev/full", code=2)
    assert "No space left" in err
    with open("/dev/full", "w") as full:
        result = run("decode", *SHORT, "--policy", "dense", "--json", code=2, stdout=full)
    assert "No space left" in result.stderr


def test_show_writes_a_picture(call: Call, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    call("show", *SHORT, "--policy", "losa", "--out", "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["map.png"]


def test_show_draws_in_the_terminal_without_writing_anything(call: Call, tmp_path: Path) -> None:
    out, _ = call("show", *SHORT, "--policy", "sliding-window", "--budget", "64", "--ascii", "--steps", "2")
    rows = [line for line in out.splitlines() if "|" in line]
    assert [row.split("|")[0].strip() for row in rows] == ["pass 0", "pass 1", "save"]
    assert rows[0].split("|")[1] == " " * 12 + "@" * 4, "16 pages of 16, of which the last four are read"
    assert os.listdir(tmp_path) == []


def test_show_refuses_a_block_that_was_never_decoded(call: Call) -> None:
    call("show", *SHORT, "--ascii", "--block", "-1", code=2)


def test_missing_matplotlib_is_named_with_its_remedy_before_any_work(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name, *rest)
    )
    for arguments in (["show"], ["evaluate", "--plot", "p.png"]):
        _, err = call(*arguments, code=2)
        assert "matplotlib is not installed" in err and "sparse_dlm_attn[plot]" in err


@pytest.mark.parametrize(("name", "lines"), [("losa", 19), ("sparsed", 15)])
def test_a_table_of_a_paper_is_numbers_json_and_a_picture(
    call: Call, tmp_path: Path, name: str, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tables.TABLES[name]
    monkeypatch.setitem(tables.TABLES, name, replace(whole, tasks=("single-key",)))
    options = ("--table", name, "--prompts", "1", "--length", "128", "--out", "t.json")
    out, _ = call("evaluate", *options, "--json")
    cells = json.loads(out)
    assert len(cells) == lines
    by_label = {cell["label"]: cell for cell in cells if cell["budget"] in (None, 16)}
    dense = by_label["dense"]
    assert dense["exact"] == dense["prompts"] == 1
    assert dense["density"] == dense["pair_share"] == dense["row_share"] == 1
    report = json.loads((tmp_path / "t.json").read_text())
    assert report["cells"] == cells
    assert report["table"]["tasks"] == ["single-key"] and report["environment"]["numpy"]
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    if name == "losa":
        never = by_label["dense pass 0, never refreshed"]
        assert never["later_density"] == 0 and never["density"] == pytest.approx(1 / 9, rel=0.02)
        assert by_label["QUEST, dense pass 0"]["density"] > by_label["QUEST"]["density"]
    else:
        assert by_label["Fast-dLLM, dual"]["row_share"] <= by_label["Fast-dLLM, prefix"]["row_share"] < 1
        assert by_label["SparseD"]["row_share"] == 1 > by_label["SparseD"]["pair_share"]
        assert by_label["0.05 - skipping"]["pair_share"] < by_label["SparseD, share 0.05"]["pair_share"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--table", "quest"], "unknown table 'quest'"), (["--table", "losa", "--policy", "dense"], "--policy"),
     (["--table", "losa", "--full"], "--full"), (["--table", "losa", "--budget", "8"], "--budget"),
     (["--table", "sparsed", "--length", "7"], "length")],
)
def test_a_table_fixes_what_it_compares(call: Call, tmp_path: Path, options: list[str], message: str) -> None:
    out, err = call("evaluate", *options, code=2)
    assert out == "" and message in " ".join(err.split())
    assert os.listdir(tmp_path) == []


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


def test_evaluate_gives_the_same_scores_with_several_processes(call: Call, tmp_path: Path) -> None:
    def scores(workers: str) -> list[dict[str, Any]]:
        call(
            "evaluate", "--length", "256", "--prompts", "2", "--task", "single-key", "--budget", "64",
            "--policy", "losa", "--workers", workers, "--out", f"{workers}.json",
        )
        found = json.loads((tmp_path / f"{workers}.json").read_text())["scores"]
        return [{key: value for key, value in score.items() if key != "seconds"} for score in found]

    assert scores("1") == scores("2")


def test_evaluate_exits_with_1_below_what_was_required(call: Call, tmp_path: Path) -> None:
    call("evaluate", *QUICK, "--policy", "dense", "--require", "dense=0")
    # The window cannot hold the fact, so no model answers exactly through it except by chance.
    _, err = call(
        "evaluate", *QUICK, "--seed", "5", "--policy", "sliding-window:window=1", "--require",
        "sliding-window:window=1=1", code=1,
    )
    assert "required 100 %" in err
    assert (tmp_path / "evaluation.json").exists(), "the report is written all the same"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "0"], "--prompts must be at least 1; got 0"),
        (["--prompts", "1000000000"], "--prompts must be at most 10000"),
        (["--workers", "-1"], "--workers must be at least 1"),
        (["--budget", "0"], "--budget must be at least 1"),
        (["--task", "singlekey"], "did you mean 'single-key'?"),
        (["--policy", "lossa"], "did you mean 'losa'?"),
        (["--backend", "referense"], "did you mean 'reference'?"),
        (["--length", "100"], "--length"),
        (["--length", "32768"], "at most 16384"),
        (["--require", "dense"], "--require must be written POLICY=SHARE"),
        (["--require", "dense=2"], "--require must lie in 0..1"),
        (["--require", "sparse=0.5"], "unknown policy in --require 'sparse'"),
        (["--out", "missing/evaluation.json"], "does not exist"),
        (["--out", "."], "is a directory"),
        (["--weights", "missing.safetensors"], "no such file"),
        (["--steps", "2", "--threshold", "0.5"], "must not be given together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_refuses_bad_input_before_any_work(
    call: Call, tmp_path: Path, options: list[str], message: str
) -> None:
    out, err = call("evaluate", *options, code=2)
    assert out == "" and message in " ".join(err.split())
    assert os.listdir(tmp_path) == []


@contextlib.contextmanager
def evaluating(folder: Path, workers: str) -> Iterator[subprocess.Popen[str]]:
    """Start a long evaluation in a group of its own, which ends with the test whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_dlm_attn", "evaluate", "--length", "4096", "--prompts", "50",
         "--workers", workers],
        stderr=subprocess.PIPE, text=True, cwd=folder, start_new_session=True,
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
    own = ("--json",) if command == "decode" else (
        "--prompts", "1", "--workers", "1", "--out", "found.json"
    )
    return (command, *SHORT, "--policy", "losa", "--budget", "64", "--steps", "1", *own)


@pytest.mark.parametrize("command", ["decode", "evaluate"])
@pytest.mark.parametrize(("backend", "path"), [("torch", "gather"), ("torch:attention=masked", "masked"),
                                               ("reference", "reference")])
def test_results_say_which_path_the_backend_took(command: str, backend: str, path: str, call: Call) -> None:
    device = ("--device", "cpu") if backend != "reference" else ()
    out, _ = call(*torch_options(command), "--backend", backend, *device)
    text = out if command == "decode" else Path("found.json").read_text(encoding="utf-8")
    environment = json.loads(text)["environment"]
    assert environment["attention_path"] == path
    assert environment["backend_notes"]
    assert device == () or environment["backend"].endswith("device=cpu")


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("command", ["decode", "evaluate"])
def test_a_device_that_is_not_there_is_an_error_with_a_remedy(command: str, call: Call) -> None:
    options = torch_options(command)
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    _, problem = call(*options, "--backend", "torch", "--device", "cuda", code=2)
    assert "on device 'cuda'" in problem and "use device='cpu'" in problem
    _, problem = call(*options, "--backend", "torch", "--device", "gpu", code=2)
    assert "must be 'cpu', 'cuda' or 'cuda:<number>'" in problem
    _, problem = call(*options, "--backend", "reference", "--device", "cpu", code=2)
    assert "device" in problem
