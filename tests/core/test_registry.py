"""Names to backends and policies, with reasons and remedies when one cannot be had."""

from __future__ import annotations

import copy
import pickle
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_dlm_attn import (
    CallOrderError,
    InvalidArgumentError,
    InvalidTypeError,
    StaleMemoryError,
    UnavailableError,
    UnknownNameError,
    UnsupportedError,
    get_backend,
    get_policy,
    list_backends,
    list_policies,
)
from sparse_dlm_attn.errors import DataFileError
from sparse_dlm_attn.policies.dense import Dense


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a distribution with good and broken plug-ins on the path."""
    info = tmp_path / "strangers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        textwrap.dedent("""\
        [sparse_dlm_attn.backends]
        good = strangers:Good
        needs-missing = strangers_missing:Backend
        explodes = strangers_broken:Backend
        exits = strangers_exits:Backend
        not-a-backend = strangers:NOT_A_BACKEND
        wrong-product = strangers:make_wrong
        [sparse_dlm_attn.policies]
        dense = strangers:Other
    """)
    )
    (tmp_path / "strangers.py").write_text(
        textwrap.dedent("""\
        from sparse_dlm_attn_reference import ReferenceBackend
        from sparse_dlm_attn.policies.dense import Dense
        class Good(ReferenceBackend):
            name = "good"
            def __init__(self, speed: int = 1) -> None:
                self.speed = speed
        class Other(Dense): pass
        NOT_A_BACKEND = 3
        def make_wrong(): return 3
    """)
    )
    (tmp_path / "strangers_missing.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "strangers_broken.py").write_text("raise RuntimeError('no driver')\n")
    (tmp_path / "strangers_exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("strangers")]:
        del sys.modules[name]


def test_third_parties_register_like_first_parties(plugins: Path) -> None:
    assert list_backends()["good"].distribution == "strangers"
    assert get_backend("good", speed=3).speed == 3  # type: ignore[attr-defined]
    assert type(get_backend("strangers:Good")).__name__ == "Good"
    assert get_backend("reference").name == "reference"  # the broken ones do not matter


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("needs-missing", "Install 'a_package_that_is_missing'"),
        ("explodes", "raised RuntimeError: no driver"),
        ("exits", "raised SystemExit: 3"),
        ("no_such_module:Backend", "Check the spelling of 'no_such_module'"),
        ("strangers:Missing", "Check the name after ':'"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_what_to_do(plugins: Path, name: str, words: str) -> None:
    with pytest.raises(UnavailableError, match=words):
        get_backend(name)
    if name in list_backends():
        assert words in list_backends()[name].why_not()


def test_wrong_things_are_refused_by_name(plugins: Path) -> None:
    with pytest.raises(InvalidTypeError, match="must name a Backend or a factory"):
        get_backend("not-a-backend")
    with pytest.raises(InvalidTypeError, match="must give a Backend"):
        get_backend("wrong-product")
    with pytest.raises(InvalidTypeError, match="backend must be a name or a Backend"):
        get_backend(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="registered by one distribution"):
        get_policy("dense")


def test_unknown_names_list_the_known_and_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown backend 'refrence'.*did you mean 'reference'"):
        get_backend("refrence")
    with pytest.raises(UnknownNameError, match="unknown parameter of policy 'dense' 'budget'"):
        get_policy("dense:budget=3")
    with pytest.raises(UnknownNameError, match="unknown parameter of backend"):
        get_backend("reference", device="cuda")


@pytest.mark.parametrize("text", ["dense:=3", "dense:a=", "dense:a=1,a=2", "dense:a=1,b"])
def test_parameter_strings_that_do_not_parse_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="policy must"):
        get_policy(text)


def test_instances_pass_through_and_take_no_options() -> None:
    policy = Dense()
    assert get_policy(policy) is policy
    with pytest.raises(InvalidTypeError, match="must be a name when options are given"):
        get_policy(policy, budget=3)
    assert "dense" in list_policies()


@pytest.mark.parametrize(
    ("get", "name"), [(get_policy, "sparsed:ratio"), (get_backend, "torch:"), (get_backend, "reference:speed")]
)
def test_a_parameter_without_a_value_is_no_module(get: Callable[[str], object], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"name:key=value.*is registered"):
        get(name)


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("k", "must be 1", (2, 3), "Pass 1."),
        InvalidTypeError("k", "must be int", "'a'"),
        UnknownNameError("policy", "dens", ["dense"]),
        UnavailableError("backend 'x'", ["no y"], "Install y."),
        UnsupportedError("x", ["head_dim 7"]),
        StaleMemoryError("memory is old."),
        CallOrderError("next()", "must be last", "first", "Wait."),
        DataFileError("no such file"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_of_another_process_say_the_same(error: Exception, again: Callable[[Any], Any]) -> None:
    got = again(error)
    assert type(got) is type(error)
    assert (str(got), got.args, vars(got)) == (str(error), error.args, vars(error))
