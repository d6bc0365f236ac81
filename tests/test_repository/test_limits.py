"""What the runner of these tests is told: limits of time, and warnings that are none."""

from __future__ import annotations

import ast
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]


def limits(node: ast.AST, runner: float) -> Iterator[tuple[int, float, float]]:
    """Yield the line of each call that is given a limit in seconds, the limit, and that of its test."""
    for decorator in getattr(node, "decorator_list", ()):
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.timeout":
            runner = ast.literal_eval(decorator.args[0])
    if isinstance(node, ast.keyword) and node.arg == "timeout" and isinstance(node.value, ast.Constant):
        yield node.value.lineno, node.value.value, runner
    for child in ast.iter_child_nodes(node):
        yield from limits(child, runner)


def test_no_test_gives_a_process_more_time_than_it_has_itself() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {own} s within {runner} s"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, own, runner in limits(ast.parse(path.read_text("utf-8")), OPTIONS["timeout"])
        if own >= runner
    ]
    assert not wrong


def test_benchmarks_that_do_not_run_beside_xdist_are_no_error() -> None:
    # Words of pytest-benchmark before 5.3, in a class that is there only where it is installed.
    warnings.warn(
        "Benchmarks are automatically disabled because xdist plugin is active.Benchmarks cannot be performed "
        "reliably in a parallelized environment.", stacklevel=1,
    )
