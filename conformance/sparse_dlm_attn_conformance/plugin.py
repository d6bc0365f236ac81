"""The pytest plugin: ``pytest --pyargs sparse_dlm_attn_conformance --sda-backend NAME``.

It is loaded in every pytest run of an environment that has this package, so it imports nothing but
pytest until laws are collected.
"""

from __future__ import annotations

import gc
import os
import platform
import warnings
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sparse_dlm_attn_conformance import PROFILES

if TYPE_CHECKING:
    from sparse_dlm_attn_conformance.run import Session

PACKAGE = Path(__file__).parent
SESSION: pytest.StashKey[Session] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a conformance run."""
    group = parser.getgroup("sparse_dlm_attn conformance")

    def add(name: str, metavar: str, text: str, **options: Any) -> None:
        group.addoption(f"--sda-{name}", metavar=metavar, help=text, **options)

    many: dict[str, Any] = {"action": "append", "default": []}
    add("backend", "NAME", "backend under test: a registered name or module:attr; may be repeated", **many)
    text = "policy under test, e.g. losa or module:attr; may be repeated (default: all registered)"
    add("policy", "POLICY", text, **many)
    text = "test only this dtype; may be repeated (default: all that the backend declares)"
    add("dtype", "DTYPE", text, **many)
    add("device", "DEVICE", "passed to the backend as device=DEVICE")
    add("clause", "ID", "run only laws of this clause (MERGE-1) or group (MERGE); may be repeated", **many)
    add(
        "profile",
        "PROFILE",
        f"how many problems each law gets: {', '.join(PROFILES)} (default: quick)",
        choices=PROFILES,
    )
    text = "that part of the profile's problems, e.g. 0.2 for a backend that takes long (default: 1)"
    add("share", "X", text, type=float, default=1.0)
    add("known-failures", "FILE", "ledger of known failures (TOML)")
    add("report", "FILE", "write the report: JSON, or a Markdown matrix if the name ends in .md", **many)
    text = "time limit of one problem in seconds, compilation included; 0 for none (default: 120)"
    add("seconds", "S", text, type=float, default=120.0)
    add("finished", "FILE", "file to make when the run is over")
    text = "where the nightly profile stores failing problems"
    add("database", "DIR", text, default=".hypothesis/sda-nightly")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks; load backends and profile if this is a conformance run."""
    config.addinivalue_line("markers", "clause(*ids): clauses of the specification that a law holds")
    config.addinivalue_line("markers", "conformance: a law of the conformance suite")
    if config.getoption("--sda-backend"):
        from sparse_dlm_attn import SparseAttentionError
        from sparse_dlm_attn_conformance.run import Session

        try:
            config.stash[SESSION] = Session.of_config(config)
        except SparseAttentionError as error:
            raise pytest.UsageError(str(error)) from None


def session_of(config: pytest.Config) -> Session | None:
    """Return the conformance session of this run, if it is one."""
    return config.stash.get(SESSION, None)


def is_law(item: Any) -> bool:
    """Return whether a collected item comes from this package."""
    return PACKAGE in Path(item.path).parents


def clauses_of_item(item: pytest.Item) -> tuple[str, ...]:
    """Return the clauses that an item is marked with."""
    return tuple(str(clause) for mark in item.iter_markers("clause") for clause in mark.args)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is under test."""
    session = session_of(config)
    if session is None:
        return []
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("SDA_")]
    ours = f"python {platform.python_version()}; SDA_* variables: {', '.join(variables) or 'none'}"
    return [*session.header(), ours]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hand each law every backend and dtype, and each policy law every policy."""
    if not is_law(metafunc.definition) or "subject" not in metafunc.fixturenames:
        return
    session = session_of(metafunc.config)
    if session is None:
        raise pytest.UsageError(
            "the conformance suite needs --sda-backend NAME, e.g. --sda-backend reference; "
            "`sparse-dlm-attn backends` lists the registered ones"
        )
    with_policies = "policy" in metafunc.fixturenames
    once = with_policies or getattr(metafunc.function, "one_dtype", False)
    subjects = session.one_dtype_each if once else session.subjects
    metafunc.parametrize("subject", subjects, ids=str, scope="session")
    if with_policies:
        metafunc.parametrize("policy", session.contenders, ids=str, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the laws of the wanted clauses; foreign code may warn about NaN without failing a law."""
    session = session_of(config)
    if session is None:
        return
    from sparse_dlm_attn_conformance.clauses import matches
    from sparse_dlm_attn_conformance.report import GATES

    dropped = []
    for item in filter(is_law, items):
        item.add_marker("conformance")
        item.add_marker(pytest.mark.filterwarnings("default"))
        wanted = any(matches(clause, session.clauses) for clause in clauses_of_item(item))
        if session.clauses and not wanted and not item.name.startswith(GATES):
            dropped.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the garbage collector leave alone what lives as long as the run: it takes a while to go through."""
    if session_of(session.config) is not None:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Record what a law does while it runs."""
    if session_of(pyfuncitem.config) is None or not is_law(pyfuncitem):
        return (yield)
    from sparse_dlm_attn_conformance.laws import RECORD, Record

    record = Record()
    pyfuncitem.user_properties.append(("sda_record", record))
    token = RECORD.set(record)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (yield)
    finally:
        RECORD.reset(token)
        if record.statistics:
            pyfuncitem.hypothesis_statistics = record.statistics  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn an outcome into a result, and a failure into its own text without our stack."""
    report = yield
    session = session_of(item.config)
    if session is None or not is_law(item) or (report.when != "call" and report.outcome == "passed"):
        return report
    from sparse_dlm_attn_conformance.checks import ConformanceFailure
    from sparse_dlm_attn_conformance.laws import Record

    error = call.excinfo.value if call.excinfo is not None else None
    if isinstance(error, ConformanceFailure):
        report.longrepr = str(error)
    record: Any = dict(item.user_properties).get("sda_record") or Record()
    item.user_properties[:] = [entry for entry in item.user_properties if entry[0] != "sda_record"]
    result = session.result(item, clauses_of_item(item), report, record)
    report.user_properties = [*item.user_properties, ("sda", asdict(result))]
    return report


class Collector:
    """Gathers results, also those that xdist's workers send."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the result that travels with a report."""
        self.session.report.add(dict(report.user_properties).get("sda"))
        when: str | None = report.when
        if when == "???":  # xdist's report of a law in which its worker died
            self.session.report.results.append(self.session.crash(report))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Start gathering."""
    conformance = session_of(session.config)
    if conformance is not None:
        session.config.pluginmanager.register(Collector(conformance), "sda-collector")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the reports; a run in which nothing ran on a backend has failed."""
    conformance = session_of(session.config)
    if conformance is None or hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    problem = conformance.finish()
    if session.config.getoption("--sda-finished"):
        Path(session.config.getoption("--sda-finished")).touch()
    if problem and exitstatus in (0, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the summary."""
    session = session_of(config)
    if session is not None and not config.option.collectonly:
        terminalreporter.section("conformance")
        for line in [*session.report.lines(), *session.problems]:
            terminalreporter.write_line(line)
