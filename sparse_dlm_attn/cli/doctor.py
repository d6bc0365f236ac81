"""The command `doctor`: what works here, what is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

import typer

from sparse_dlm_attn import registry
from sparse_dlm_attn.cli.console import print_json, result_console, table
from sparse_dlm_attn.errors import SparseAttentionError, UnavailableError
from sparse_dlm_attn.registry import Plugin

__all__ = ["Check", "doctor"]

Status = Literal["ok", "missing", "broken"]

OPTIONAL = (
    ("matplotlib", "pictures (`show`, `evaluate`)", "plot"),
    ("hypothesis", "the conformance suite", "conformance"),
)


@dataclass(frozen=True)
class Check:
    """One finding.

    Parameters
    ----------
    name : str
        What was looked at.
    status : {"ok", "missing", "broken"}
        "missing" is optional and harmless; "broken" was registered or shipped and does not work.
    detail : str
        What was found.
    remedy : str
        What to do about it, "" if nothing.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Check this installation; exit with 1 if something registered is broken."""
    checks = [*_platform(), *_optional(), *_plugins(), *_contributed()]
    broken = sum(check.status == "broken" for check in checks)
    if as_json:
        print_json({"broken": broken, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks, broken)
    if broken:
        raise typer.Exit(1)


def _platform() -> Iterator[Check]:
    from sparse_dlm_attn import SPEC_VERSION, __version__

    yield Check("sparse-dlm-attn", "ok", f"{__version__}, specification {SPEC_VERSION}")
    python = platform.python_version()
    known = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Check("Python", "ok" if known else "missing", python, "" if known else "Tested with Python 3.11 to 3.13.")
    for name in ("numpy", "array-api-compat", "safetensors", "typer", "rich"):
        yield Check(name, "ok", _version(name))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "version unknown"


def _optional() -> Iterator[Check]:
    """Look for optional packages without importing them."""
    for module, purpose, extra in OPTIONAL:
        if importlib.util.find_spec(module) is None:
            yield Check(module, "missing", f"optional, for {purpose}", f"pip install 'sparse_dlm_attn[{extra}]'")
        else:
            yield Check(module, "ok", f"{_version(module)}, for {purpose}")


def _plugins() -> Iterator[Check]:
    from sparse_dlm_attn.cli.application import load_command

    for plugin in registry.list_backends().values():
        yield _examine(plugin, partial(registry.get_backend, plugin.name))
    for plugin in registry.list_policies().values():
        yield _examine(plugin, partial(registry.get_policy, plugin.name))
    for plugin in registry.commands().values():
        yield _examine(plugin, partial(load_command, plugin))


def _examine(plugin: Plugin, build: Callable[[], object]) -> Check:
    name = f"{plugin.kind} {plugin.name}"
    try:
        build()
    except UnavailableError as error:
        status: Status = "missing" if _lacks_other_package(plugin, error) else "broken"
        return Check(name, status, "; ".join(error.reasons), error.remedy)
    except SparseAttentionError as error:
        return Check(name, "broken", str(error), f"Repair or uninstall {plugin.distribution}.")
    return Check(name, "ok", f"from {plugin.distribution}")


def _lacks_other_package(plugin: Plugin, error: UnavailableError) -> bool:
    """Whether the plug-in is whole and only something it needs is not there."""
    cause = error.__cause__
    if cause is None:  # it says itself why it cannot run here
        return True
    own = plugin.target.partition(":")[0].partition(".")[0]
    return isinstance(cause, ModuleNotFoundError) and (cause.name or own).partition(".")[0] != own


def _contributed() -> Iterator[Check]:
    """Run the checks that other distributions register (group ``sparse_dlm_attn.checks``)."""
    for plugin in registry.checks().values():
        try:
            found = plugin.load()()
        except Exception as error:  # a foreign check may fail in any way
            yield Check(f"check {plugin.name}", "broken", str(error), f"Repair {plugin.distribution}.")
        else:
            yield (
                found
                if isinstance(found, Check)
                else Check(
                    f"check {plugin.name}",
                    "broken",
                    f"returned a {type(found).__name__}, not a Check",
                    f"Repair {plugin.distribution}.",
                )
            )


def _print(checks: list[Check], broken: int) -> None:
    from rich.text import Text

    styles = {"ok": "green", "missing": "yellow", "broken": "bold red"}
    rows = [
        (check.name, Text(check.status, style=styles[check.status]), check.detail, check.remedy) for check in checks
    ]
    console = result_console()
    console.print(table(("what", "status", "found", "what to do"), (), rows))
    missing = sum(check.status == "missing" for check in checks)
    console.print(f"{broken} broken, {missing} not available here (optional), {len(checks)} checks.")
