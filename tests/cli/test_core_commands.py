"""`backends`, `policies`, `doctor`, commands of plug-ins, and what becomes of failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sparse_dlm_attn
from sparse_dlm_attn.cli import main
from sparse_dlm_attn.registry import commands

Call = Callable[..., tuple[str, str]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Plugins = Callable[..., dict[str, str]]


def test_version_names_package_and_specification(run: Run) -> None:
    result = run("--version")
    assert sparse_dlm_attn.__version__ in result.stdout
    assert sparse_dlm_attn.SPEC_VERSION in result.stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["decode", "--help"], ["policies"]])
def test_light_commands_import_no_heavy_packages(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom sparse_dlm_attn.cli import main\n"
        f"code = main({arguments!r})\n"
        "heavy = {'torch', 'triton', 'matplotlib', 'hypothesis', 'pytest'}\n"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "0 []"


def test_backends_are_listed_with_their_capabilities(run: Run) -> None:
    records = {record["name"]: record for record in json.loads(run("backends", "--json").stdout)}
    assert records["reference"]["reason"] == ""
    assert "float64" in records["reference"]["capabilities"]["dtypes"]
    assert "reference" in run("backends").stdout


def test_policies_are_listed_with_parameters_defaults_and_help(run: Run) -> None:
    records = {record["name"]: record for record in json.loads(run("policies", "--json").stdout)}
    losa = {parameter["name"]: parameter for parameter in records["losa"]["parameters"]}
    assert losa["active"]["default"] == sparse_dlm_attn.get_policy("losa").active  # type: ignore[attr-defined]
    without = [(r["name"], p["name"]) for r in records.values() for p in r["parameters"] if not p["help"]]
    assert without == []


@pytest.mark.clause("REGISTRY-1")
def test_a_broken_plugin_is_listed_with_its_reason_and_breaks_nothing_else(run: Run, plugins: Plugins) -> None:
    environment = plugins(
        "[sparse_dlm_attn.commands]\ngreet = outsider:greet\nboom = outsider_broken:boom\n"
        "notfunction = outsider:NUMBER\n"
        "[sparse_dlm_attn.backends]\ncrooked = outsider_broken:Backend\n",
        outsider="NUMBER = 3\ndef greet(name: str) -> None:\n    'Greet.'\n    print('hello', name)\n",
        outsider_broken="raise RuntimeError('half installed')\n",
    )
    assert run("greet", "Ishmael", environment=environment).stdout == "hello Ishmael\n"
    assert "half installed" in run("boom", "--any", "thing", code=2, environment=environment).stderr
    assert "must be a function" in run("notfunction", code=2, environment=environment).stderr
    assert "not available" in run("--help", environment=environment).stdout
    listed = run("backends", environment=environment).stdout
    assert "half installed" in listed and "reference" in listed


def test_doctor_exits_with_1_and_names_what_is_broken(run: Run, plugins: Plugins) -> None:
    environment = plugins(
        "[sparse_dlm_attn.backends]\ncrooked = outsider_broken:Backend\nlacking = outsider_lacking:Backend\n"
        "[sparse_dlm_attn.checks]\nodd = outsider:odd\n",
        outsider="def odd():\n    return 3\n",
        outsider_broken="raise RuntimeError('half installed')\n",
        outsider_lacking="import a_package_nobody_has\n",
    )
    result = run("doctor", "--json", code=1, environment=environment)
    report = json.loads(result.stdout)
    status = {check["name"]: check["status"] for check in report["checks"]}
    assert status["backend crooked"] == "broken"
    assert status["backend lacking"] == "missing", "a package it needs is absent: harmless"
    assert status["check odd"] == "broken"
    assert status["backend reference"] == "ok"
    assert report["broken"] == 2


def test_doctor_is_content_with_this_installation(run: Run) -> None:
    report = json.loads(run("doctor", "--json").stdout)
    assert report["broken"] == 0
    assert {"Python", "numpy", "matplotlib"} <= {check["name"] for check in report["checks"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policies", "lossa"], "did you mean 'losa'?"),
        (["policies", "LoSA"], "did you mean 'losa'?"),
        (["policies", "quest:budgit=64"], "did you mean 'budget'?"),
        (["policies", "quest:budget=0"], "policy 'quest': budget must be at least 1; got 0"),
        (["policies", "quest:budget"], "its parameters: `sparse-dlm-attn policies quest`"),
        (["backends", "refrence"], "did you mean 'reference'?"),
        (["backends", "reference:device=cuda"], "leave --device out, or name another --backend"),
        (["policies", "no_such_module:Policy"], "no_such_module"),
        (["decoed"], "did you mean 'decode'?"),
        (["--no-such-option"], "--no-such-option"),
        (["backends", "--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_gives_one_message_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments, code=2)
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["", "backends", "policies", "doctor", *commands()])
def test_every_command_takes_the_short_option_for_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "-h"] if command else ["-h"]) == 0
    short = capsys.readouterr().out
    assert main([command, "--help"] if command else ["--help"]) == 0
    assert short == capsys.readouterr().out
    assert "Usage: sparse-dlm-attn" in short


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("policies", "quest:budget=64"), {"budget": (64, 256), "min_pages": (1, 1)}),
        (("policies", "sparse_dlm_attn.policies.quest:Quest:budget=64"), {"budget": (64, 256)}),
        (("policies", "outsider:make_policy"), {"budget": (32, 32)}),
        (("policies", "outsider:make_policy:budget=8"), {"budget": (8, 32)}),
        (("policies", "outsider:POLICY"), {}),
        (("backends", "outsider:Backend:speed=3"), {"speed": (3, 1)}),
        (("backends", "reference"), {}),
    ],
)
@pytest.mark.usefixtures("outsider")
def test_a_choice_is_explained_with_the_parameters_that_are_written(
    call: Call, arguments: tuple[str, ...], shown: dict[str, tuple[int, int]]
) -> None:
    record = json.loads(call(*arguments, "--json")[0])
    found = {each["name"]: (each["value"], each["default"]) for each in record["parameters"]}
    assert found.items() >= shown.items() and bool(found) == bool(shown)
    assert ("float32" in record["capabilities"]["dtypes"]) if arguments[0] == "backends" else "text" in record
    text, _ = call(*arguments)
    assert arguments[1] in text and all(name in text for name in shown)


@pytest.mark.parametrize("command", ["policies", "backends"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outsider:make_number", "must give a "),
        ("outsider:NUMBER", "must name a "),
        ("outsider:Mising", "Check the name after ':' in 'outsider:Mising'"),
        ("outsidr:POLICY", "Check the spelling of 'outsidr'"),
        ("os.path:join", "must be constructible with these options"),
        (":x", "is named 'module:attr'"),
        ("outsider:", "is named 'module:attr'"),
        ("", "is named 'module:attr'"),
    ],
)
@pytest.mark.usefixtures("outsider")
def test_what_is_no_choice_is_a_typed_error(call: Call, command: str, name: str, message: str) -> None:
    out, err = call(command, name, code=2)
    assert message in err and len(err.splitlines()) == 1
    assert out == ""


@pytest.mark.usefixtures("outsider")
def test_commands_find_modules_of_the_current_directory_and_leave_the_path_alone(call: Call) -> None:
    before = list(sys.path)
    call("policies", "outsider:make_policy")
    call("backends", "outsider:Backend")
    call("policies", "outsider:missing", code=2)
    assert sys.path == before
    del sys.modules["outsider"]
    with pytest.raises(sparse_dlm_attn.UnavailableError):  # a library does not care where it runs
        sparse_dlm_attn.get_policy("outsider:make_policy")


@pytest.mark.usefixtures("outsider")
def test_the_safe_path_of_python_is_respected() -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-m", "sparse_dlm_attn", "policies", "outsider:make_policy"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "Check the spelling of 'outsider'" in result.stderr


def test_a_defect_is_one_message_and_a_traceback_only_on_request(run: Run, plugins: Plugins) -> None:
    environment = plugins(
        "[sparse_dlm_attn.commands]\nbuggy = outsider:buggy\n", outsider="def buggy() -> None:\n    [][1]\n"
    )
    result = run("buggy", code=2, environment=environment)
    assert "unexpected IndexError" in result.stderr and "SDA_TRACEBACK" in result.stderr
    shown = run("buggy", code=2, environment={**environment, "SDA_TRACEBACK": "1"})
    assert "Traceback" in shown.stderr


def test_an_interrupt_ends_with_130(run: Run, plugins: Plugins) -> None:
    environment = plugins(
        "[sparse_dlm_attn.commands]\nlong = outsider:long\n",
        outsider="def long() -> None:\n    raise KeyboardInterrupt\n",
    )
    assert "interrupted" in run("long", code=130, environment=environment).stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
@pytest.mark.parametrize(
    "arguments", [("policies", "--json"), ("policies",), ("backends",), ("doctor",), ("--version",), ("-h",)]
)
def test_a_full_disk_behind_standard_output_is_reported(run: Run, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        result = run(*arguments, code=2, stdout=full)
    assert "No space left" in result.stderr and len(result.stderr.splitlines()) == 1


def test_closed_standard_output_is_reported(run: Run) -> None:
    command = f"exec {sys.executable} -m sparse_dlm_attn policies >&-"
    result = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert "standard output is closed" in result.stderr


@pytest.mark.parametrize("arguments", [("policies", "--json"), ("policies",), ("policies", "losa")])
def test_a_reader_that_leaves_early_is_no_error(run: Run, arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    result = run(*arguments, stdout=write)
    os.close(write)
    assert result.stderr == ""
