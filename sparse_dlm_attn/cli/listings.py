"""The commands `backends` and `policies`: what can be chosen, and what each choice means."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from sparse_dlm_attn import registry
from sparse_dlm_attn.cli.console import print_json, result_console
from sparse_dlm_attn.errors import SparseAttentionError, UnknownNameError
from sparse_dlm_attn.registry import Plugin

__all__ = ["backend_record", "backends", "policies", "policy_record"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def backends(as_json: AsJson = False) -> None:
    """List the backends: what each supports, where it comes from, why it is not available."""
    records = [backend_record(plugin) for plugin in registry.backends().values()]
    if as_json:
        print_json(records)
        return
    from rich.table import Table

    table = Table("backend", "from", "status", "dtypes", "devices", "what it is")
    for record in records:
        facts = record["capabilities"]
        about = facts.get("notes") or record["summary"]
        if facts.get("plans_on_host"):
            about = f"{about.rstrip('.')}; plans on the host."
        table.add_row(
            record["name"], record["distribution"], _status(record), ", ".join(facts.get("dtypes", ())),
            ", ".join(facts.get("devices", ())), about,
        )
    result_console().print(table)


def policies(
    name: Annotated[
        str | None, typer.Argument(help="Show one policy with all its parameters.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the policies, or explain one: what it does, its parameters and their defaults."""
    plugins = registry.policies()
    if name is not None and name not in plugins and ":" not in name:
        raise UnknownNameError("policy", name, plugins)
    if name is not None:
        plugin = plugins.get(name, Plugin("policy", name, name, "your Python path"))
        record = policy_record(plugin)
        if record["reason"]:
            plugin.load()  # raises the typed error
        print_json(record) if as_json else _print_policy(record)
        return
    records = [policy_record(plugin) for plugin in plugins.values()]
    print_json(records) if as_json else _print_policies(records)


def backend_record(plugin: Plugin) -> dict[str, Any]:
    """Describe a backend: name, source, capabilities, or the reason why it is not available.

    Parameters
    ----------
    plugin : Plugin
        A registered backend.
    """
    record: dict[str, Any] = {**_source(plugin), "summary": "", "reason": "", "capabilities": {}}
    try:
        backend = registry.get_backend(plugin.name)
        record["capabilities"] = dataclasses.asdict(backend.capabilities)
    except SparseAttentionError as error:
        record["reason"] = str(error)
    except Exception as error:  # a foreign backend may fail in any way
        record["reason"] = f"{type(error).__name__}: {error}"
    else:
        record["summary"] = _summary(type(backend))
    return record


def policy_record(plugin: Plugin) -> dict[str, Any]:
    """Describe a policy: name, source, parameters, or the reason why it is not available.

    Parameters
    ----------
    plugin : Plugin
        A registered policy, or one named ``"module:attr"``.
    """
    record: dict[str, Any] = {**_source(plugin), "summary": "", "text": "", "reason": "", "parameters": []}
    try:
        target = plugin.load()
        registry.get_policy(plugin.name)
    except SparseAttentionError as error:
        record["reason"] = str(error)
        return record
    record["summary"] = _summary(target)
    record["text"] = inspect.getdoc(target) or ""
    record["parameters"] = _parameters(target)
    return record


def _source(plugin: Plugin) -> dict[str, str]:
    return {"name": plugin.name, "target": plugin.target, "distribution": plugin.distribution}


def _summary(target: Any) -> str:
    return (inspect.getdoc(target) or "").split("\n\n", 1)[0].replace("\n", " ")


def _parameters(target: Any) -> list[dict[str, Any]]:
    """Return name, default and help of each parameter; a factory shows its signature only."""
    if dataclasses.is_dataclass(target):
        return [
            {"name": field.name, "default": _plain(field.default), "help": field.metadata.get("help", "")}
            for field in dataclasses.fields(target) if field.init
        ]
    return [
        {"name": name, "default": _plain(parameter.default), "help": ""}
        for name, parameter in inspect.signature(target).parameters.items()
    ]


def _plain(value: Any) -> Any:
    """Return a default as JSON can say it; a required parameter has the text "required"."""
    if value in (dataclasses.MISSING, inspect.Parameter.empty):
        return "required"
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _written(value: Any) -> str:
    """Return a value as it is written after ``name:key=``."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _status(record: dict[str, Any]) -> Any:
    from rich.text import Text

    reason = record["reason"]
    return Text(f"not available: {reason}", style="yellow") if reason else Text("available", style="green")


def _print_policies(records: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("policy", "what it does", "parameters", "from")
    for record in records:
        settings = ", ".join(f"{p['name']}={_written(p['default'])}" for p in record["parameters"])
        about = _status(record) if record["reason"] else Text(record["summary"])
        table.add_row(record["name"], about, Text(settings), record["distribution"])
    console = result_console()
    console.print(table)
    console.print("Details: sparse-dlm-attn policies NAME. Use: --policy NAME:key=value,key=value")


def _print_policy(record: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = result_console()
    console.print(Text(f"{record['name']} (from {record['distribution']}: {record['target']})", style="bold"))
    console.print()
    console.print(Text(record["text"]))
    if not record["parameters"]:
        console.print("\nIt has no parameters.")
        return
    table = Table("parameter", "default", "meaning")
    for parameter in record["parameters"]:
        table.add_row(parameter["name"], _written(parameter["default"]), Text(parameter["help"]))
    console.print(table)
    first = record["parameters"][0]
    console.print(
        f"Use: --policy {record['name']}:{first['name']}={_written(first['default'])}", markup=False
    )
