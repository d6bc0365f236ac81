"""The commands `backends` and `policies`: what can be chosen, and what each choice means."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from sparse_dlm_attn import registry
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.cli.console import print_json, result_console, table
from sparse_dlm_attn.errors import InvalidTypeError
from sparse_dlm_attn.registry import Plugin

__all__ = ["backends", "choice_record", "policies"]

CHOICES: dict[str, Any] = {
    "backend": (registry.list_backends, registry.get_backend),
    "policy": (registry.list_policies, registry.get_policy),
}
WRITTEN = "NAME[:key=value,...]"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def backends(
    name: Annotated[
        str | None, typer.Argument(help="Show one backend with all its parameters.", metavar=WRITTEN)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the backends, or explain one: what it supports, its parameters, why it is not available."""
    if name is not None:
        _explain("backend", name, as_json)
        return
    records = list(_records("backend"))
    if as_json:
        print_json(records)
        return
    rows = []
    for record in records:
        facts = record["capabilities"]
        about = facts.get("notes") or record["summary"]
        if facts.get("plans_on_host"):
            about = f"{about.rstrip('.')}; plans on the host."
        dtypes, devices = (", ".join(facts.get(name, ())) for name in ("dtypes", "devices"))
        rows.append((record["name"], record["distribution"], _status(record), dtypes, devices, about))
    console = result_console()
    console.print(table(("backend", "from", "status", "dtypes", "devices", "what it is"), (), rows))
    console.print("Details: sparse-dlm-attn backends NAME. Use: --backend NAME:key=value,key=value")


def policies(
    name: Annotated[
        str | None, typer.Argument(help="Show one policy with all its parameters.", metavar=WRITTEN)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the policies, or explain one: what it does, its parameters and their defaults."""
    if name is not None:
        _explain("policy", name, as_json)
        return
    records = list(_records("policy"))
    if as_json:
        print_json(records)
        return
    rows = []
    for record in records:
        settings = ", ".join(f"{p['name']}={_written(p['default'])}" for p in record["parameters"])
        about = _status(record) if record["reason"] else record["summary"]
        rows.append((record["name"], about, settings, record["distribution"]))
    console = result_console()
    console.print(table(("policy", "what it does", "parameters", "from"), (), rows))
    console.print("Details: sparse-dlm-attn policies NAME. Use: --policy NAME:key=value,key=value")


def choice_record(kind: str, text: str) -> dict[str, Any]:
    """Describe a backend or policy: where it comes from, its parameters, what a backend supports.

    Parameters
    ----------
    kind : {"backend", "policy"}
        What is chosen.
    text : str
        A registered name, ``"name:key=value,..."`` or ``"module:attr"``.

    Raises
    ------
    SparseAttentionError
        If there is no such choice, it is not available here, or a parameter is wrong.
    """
    plugins, get = CHOICES[kind]
    made = get(text)
    name, written = registry.split_parameters(kind, text)
    plugin = plugins().get(name, Plugin(kind, name, name, "your Python path"))
    target = plugin.load()
    about = inspect.getdoc(target) or inspect.getdoc(type(made)) or ""
    if about.startswith(f"{type(made).__name__}("):  # a dataclass without a docstring gets its signature
        about = ""
    record = {
        **_source(plugin),
        "name": text,
        "summary": about.split("\n\n", 1)[0].replace("\n", " "),
        "text": about,
        "reason": "",
        "parameters": _parameters(target, written),
    }
    if isinstance(made, Backend):
        try:
            record["capabilities"] = dataclasses.asdict(made.capabilities)
        except Exception as error:  # a foreign backend may fail in any way
            raise InvalidTypeError(
                f"backend {text!r}", "must declare its capabilities", f"{type(error).__name__}: {error}"
            ) from error
    return record


def _records(kind: str) -> Iterator[dict[str, Any]]:
    """Describe what is registered, or say why it is not available; one broken choice spoils no other."""
    for plugin in CHOICES[kind][0]().values():
        try:
            yield choice_record(kind, plugin.name)
        except Exception as error:  # a foreign choice may fail in any way
            yield {
                **_source(plugin),
                "summary": "",
                "text": "",
                "reason": str(error),
                "parameters": [],
                **({"capabilities": {}} if kind == "backend" else {}),
            }


def _source(plugin: Plugin) -> dict[str, Any]:
    return {"name": plugin.name, "target": plugin.target, "distribution": plugin.distribution}


def _parameters(target: Any, written: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return name, default, value and help of each parameter; only dataclasses can say the help."""
    if isinstance(target, type) and dataclasses.is_dataclass(target):
        found = [
            (field.name, _default_of(field), field.metadata.get("help", ""))
            for field in dataclasses.fields(target)
            if field.init
        ]
    elif callable(target):
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        given = inspect.signature(target).parameters.values()
        found = [(each.name, each.default, "") for each in given if each.kind not in variable]
    else:  # an instance, which takes none
        found = []
    return [
        {"name": name, "default": _plain(default), "value": _plain(written.get(name, default)), "help": about}
        for name, default, about in found
    ]


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    """Return a value as JSON can say it; a required parameter has the text "required"."""
    if value is inspect.Parameter.empty:
        return "required"
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and isinstance(value, bool | int | float | str | None) else repr(value)


def _written(value: Any) -> str:
    """Return a value as it is written after ``name:key=``."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _status(record: dict[str, Any]) -> Any:
    from rich.text import Text

    reason = record["reason"]
    return Text(f"not available: {reason}", style="yellow") if reason else Text("available", style="green")


def _explain(kind: str, text: str, as_json: bool) -> None:
    """Print one choice with all its parameters."""
    record = choice_record(kind, text)
    if as_json:
        print_json(record)
        return
    from rich.text import Text

    console = result_console()
    console.print(Text(f"{text} (from {record['distribution']}: {record['target']})", style="bold"))
    console.print()
    console.print(Text(record["text"]))
    console.print()
    facts = {key: value for key, value in record.get("capabilities", {}).items() if value not in (None, "")}
    if facts:
        supports = [
            (key, ", ".join(map(str, value)) if isinstance(value, tuple) else _written(value))
            for key, value in facts.items()
        ]
        console.print(table(("capability", "value"), (), supports))
    if not record["parameters"]:
        console.print("It has no parameters.")
        console.print(Text(f"Use: --{kind} {text}"))
        return
    headings = ["parameter", "value", "default"]
    headings += ["meaning"] * any(parameter["help"] for parameter in record["parameters"])
    rows = []
    for parameter in record["parameters"]:
        value, default = _written(parameter["value"]), _written(parameter["default"])
        changed = Text(value, style="bold" if value != default else "")
        rows.append((parameter["name"], changed, default, parameter["help"])[: len(headings)])
    console.print(table(headings, (), rows))
    first = record["parameters"][0]
    example = text if "=" in text else f"{text}:{first['name']}={_written(first['default'])}"
    console.print(Text(f"Use: --{kind} {example}"))
