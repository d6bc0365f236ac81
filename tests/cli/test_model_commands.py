"""`decode` and `show`: output, options, and every kind of bad input."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., tuple[str, str]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.usefixtures("in_an_empty_directory")
SHORT = ("--task", "single-key", "--length", "256")


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


def test_a_prompt_can_be_a_file_or_standard_input(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    unasked = ("--prompt", "prompt.txt", "--max-blocks", "1", "--policy", "dense", "--json")
    (continued,) = json.loads(call("decode", *unasked)[0])["results"]
    assert (continued["exact"], continued["blocks"]) == (None, 1), "nothing was asked, so nothing is judged"


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
        "decode",
        "--policy",
        "losa",
        "--policy",
        "quest",
        "--policy",
        "sliding-window",
        "--policy",
        "streaming-llm",
        "--json",
    )
    report = json.loads(out)
    assert report["prompt"]["bytes"] == 4096
    exact = {result["name"]: result["exact"] for result in report["results"]}
    assert exact == {"dense": True, "losa": True, "quest": True, "sliding-window": False, "streaming-llm": False}
    shares = {r["name"]: r["reads"]["everything"]["byte_share"] for r in report["results"]}
    assert shares["losa"] < 0.5 and shares["quest"] < 0.5


@pytest.mark.usefixtures("outsider")
@pytest.mark.parametrize("command", ["decode", "show", "evaluate"])
def test_policies_and_backends_of_the_current_directory_are_found(command: str, call: Call) -> None:
    own = {"decode": ("--steps", "1"), "show": ("--ascii",), "evaluate": ("--prompts", "1", "--workers", "1")}
    before = list(sys.path)
    chosen = ("--policy", "outsider:make_policy", "--policy", "outsider:POLICY")
    out, _ = call(command, *SHORT, *chosen, "--backend", "outsider:Backend", *own[command])
    assert "outsider:make_policy:budget=" in out and "outsider:POLICY" in out
    assert sys.path == before


@pytest.mark.usefixtures("outsider")
def test_processes_of_an_evaluation_find_them_too(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "program.py"  # as an installed one, which has its own folder on the path
    program.write_text("from sparse_dlm_attn.cli import main\nif __name__ == '__main__':\n    main()\n")
    result = subprocess.run(
        [
            sys.executable,
            str(program),
            "evaluate",
            "--length",
            "256",
            "--task",
            "single-key",
            "--prompts",
            "8",
            "--policy",
            "outsider:POLICY",
            "--steps",
            "1",
            "--workers",
            "2",
        ],
        capture_output=True,
        text=True,
    )
    assert "outsider:POLICY" in result.stdout, result.stderr


@pytest.mark.clause("ERROR-1", "ERROR-2")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--policy lossa", "did you mean 'losa'?"),
        ("--policy losa:buget=3", "did you mean 'budget'?"),
        ("--policy losa:budget=0", "policy 'losa': budget must be at least 1; got 0"),
        ("--policy losa:budget=many", "budget must be an int"),
        ("--policy losa:budget", "--policy"),
        ("--policy=", "--policy"),
        ("--policy no_such_module:Policy", "no_such_module"),
        ("--backend referense", "did you mean 'reference'?"),
        ("--device cuda", "leave --device out, or name another --backend"),
        ("--backend torch:device=cpu --device cpu", "--device must not be given together with"),
        ("--device=", "--device must be one device"),
        ("--budget 0", "--budget must be at least 1; got 0"),
        ("--budget much", "--budget"),
        ("--task multi_key", "did you mean 'multi-key'?"),
        ("--full-sequence --length 16384", "--length must leave prompt and answer within 16384 bytes"),
        ("--full-sequence --max-blocks 1024", "--max-blocks must leave prompt and answer within"),
        ("--full-sequence --policy losa --policy quest", "--policy must be given once with --full-sequence"),
        ("--length 100", "--length must be a positive multiple of block_length=16; got 100"),
        ("--length -16", "--length must be a positive multiple"),
        ("--length 32", "--length must be at least"),
        ("--length 16400", "at most 16384"),
        ("--length 99999999999999999999", "--"),
        ("--steps 4 --threshold 0.9", "--steps must not be given together with threshold=0.9; got 4"),
        ("--steps 0", "--steps must be at least 1; got 0"),
        ("--steps 17", "--steps must be at most 16"),
        ("--threshold 1.5", "--threshold must lie in 0..1; got 1.5"),
        ("--threshold nan", "--threshold must lie in 0..1; got nan"),
        ("--block-length 7", "--block-length must be one of 8, 16, 32"),
        ("--page-size 0", "--page-size must be at least 1; got 0"),
        ("--page-size 1000000000", "--page-size must be at most 16384"),
        ("--max-blocks 0", "--max-blocks must be at least 1; got 0"),
        ("--max-blocks 1000000000", "--max-blocks must be at most 1024"),
        ("--weights missing.safetensors", "no such file"),
        ("--weights .", "directory"),
        ("--weights long.txt", "cannot read the model weights"),
        ("--no-such-option", "--no-such-option"),
        ("stray", "stray"),
        ("--question Who?", "--question needs --prompt"),
        ("--prompt missing.txt", "cannot read 'missing.txt'"),
        ("--prompt .", "directory"),
        ("--prompt empty.txt", "at least 1 byte"),
        ("--prompt=", "cannot read '': No such file"),
        ("--prompt latin.txt", "not UTF-8 text (byte 0xe9 at offset 3)"),
        ("--prompt long.txt", "at most 16384 bytes"),
        ("--prompt /dev/zero", "at most 16384 bytes"),
        ("--prompt whale.txt --question=", "--question must not be empty"),
        ("--prompt whale.txt --seed 3", "--seed must not be given together with --prompt"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_code_2(call: Call, tmp_path: Path, options: str, message: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "whale.txt").write_text("whale")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_bytes(b"x" * 16385)
    before = sorted(os.listdir(tmp_path))
    out, err = call("decode", *options.split(), code=2)
    assert out == ""
    assert message in " ".join(err.split())
    assert sorted(os.listdir(tmp_path)) == before


def test_closed_standard_input_is_reported() -> None:
    command = f"exec {sys.executable} -m sparse_dlm_attn decode --prompt - <&-"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
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


def test_show_marks_every_page_of_the_facts_that_the_answer_needs(call: Call) -> None:
    facts = json.loads(call("decode", *SHORT, "--policy", "dense", "--json")[0])["prompt"]["facts"]
    pages = {byte // 16 for fact in facts for byte in range(fact["start"], fact["end"])}
    assert len(pages) > 1
    lines = call("show", *SHORT, "--policy", "dense", "--ascii")[0].splitlines()
    (marks,) = (line for line in lines if line.strip() and set(line) <= {" ", "^"})
    first = next(line.index("|") + 1 for line in lines if "|" in line)
    assert {place - first for place, mark in enumerate(marks) if mark == "^"} == pages


def test_show_refuses_a_block_that_was_never_decoded(call: Call) -> None:
    assert "--block must be at least 0" in call("show", *SHORT, "--ascii", "--block", "-1", code=2)[1]
    assert "--block must be below 1024" in call("show", *SHORT, "--ascii", "--block", "1024", code=2)[1]
    short = ("--policy", "dense", "--steps", "1")
    assert "--block must be below 1: the answer" in call("show", *SHORT, *short, "--block", "5", code=2)[1]


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
