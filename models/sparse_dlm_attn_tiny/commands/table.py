"""What `evaluate --table` does: one of the papers' tables, as numbers, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn.cli.console import note, print_json, progress, result_console
from sparse_dlm_attn.files import write_atomically
from sparse_dlm_attn_tiny.commands import options

if TYPE_CHECKING:
    from sparse_dlm_attn_tiny.tables import Cell, Table

__all__ = ["check_alone", "evaluate_table"]


def check_alone(context: typer.Context, *names: str) -> None:
    """Raise `InvalidArgumentError` if one of these options was given: a table fixes them itself."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise InvalidArgumentError(
                f"--{name.replace('_', '-')}", "must not be given together with --table, which fixes it",
                repr(context.params[name]), "Leave one of them out.",
            )


def evaluate_table(
    name: str,
    *,
    prompts: int | None,
    length: int | None,
    seed: int,
    backend: str,
    weights: Path | None,
    out: Path,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Run a table and write what came out.

    Parameters
    ----------
    name : str
        Table by name.
    prompts, length : int or None
        Prompts a task, and bytes a prompt; None for the table's own.
    seed : int
        First seed.
    backend : str
        Backend by name.
    weights : Path or None
        Weights file; None for the shipped one.
    out, picture : Path or None
        Where results (JSON) and picture (PNG) go.
    as_json : bool
        Whether to print JSON instead of a table.
    """
    from sparse_dlm_attn_tiny.cache import DEFAULT_PAGE_SIZE
    from sparse_dlm_attn_tiny.comparison import DecodeSettings
    from sparse_dlm_attn_tiny.tables import BLOCK, STEPS, decodings, run_table, table_named

    table = table_named(name)
    lengths = table.lengths if length is None else (length,)
    count = prompts or table.prompts
    model = options.load_model(backend, weights, DecodeSettings(block_length=BLOCK, steps=STEPS))
    _check_prompts(table, lengths, seed)
    with progress() as bars:
        bar = bars.add_task(f"table {name}", total=decodings(table, count, lengths))
        cells = run_table(
            table, model, prompts=count, lengths=lengths, seed=seed, on_row=lambda: bars.advance(bar)
        )
    record = {
        "environment": options.environment_record(backend, weights, model, DEFAULT_PAGE_SIZE),
        "table": {
            "name": table.name, "title": table.title, "whole_sequence": table.whole, "tasks": table.tasks,
            "lengths": lengths, "prompts_a_task": count, "seed": seed, "block_length": BLOCK, "steps": STEPS,
        },
        "cells": [cell.as_json() for cell in cells],
    }
    write_atomically(out, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode(), "--out")
    note(f"wrote {out}")
    if picture is not None:
        from sparse_dlm_attn_tiny.plots import table_picture

        write_atomically(picture, table_picture(cells, table.title), "--plot")
        note(f"wrote {picture}")
    if as_json:
        print_json(record["cells"])
        return
    console = result_console()
    console.print(_console_table(table, cells, console.width))


def _check_prompts(table: Table, lengths: Any, seed: int) -> None:
    """Fail before anything is decoded where a prompt cannot be made."""
    from sparse_dlm_attn_tiny.prompts import prompt_of_task
    from sparse_dlm_attn_tiny.tables import BLOCK

    for length in lengths:
        for task in table.tasks:
            prompt_of_task(task, length, seed, block_length=BLOCK)


def _console_table(table: Table, cells: list[Cell], width: int) -> Any:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    from sparse_dlm_attn_tiny.report import share_text

    grid = Grid(box=box.SIMPLE_HEAD, caption=_caption(table), caption_justify="left", pad_edge=False)
    for heading in ("method", "bytes"):
        grid.add_column(heading, no_wrap=True)
    tasks = list(cells[0].tasks)
    figures = ["pairs", "rows"] if table.whole else ["density *", "bytes *", "density", "read"]
    for heading in ("exact", *tasks, *figures, "passes"):
        grid.add_column(heading, justify="right")
    for cell in cells:
        label = cell.label if cell.budget is None else f"{cell.label}, {cell.budget}"
        shares = (
            (cell.pair_share, cell.row_share) if table.whole
            else (cell.later_density, cell.later_byte_share, cell.density, cell.byte_share)
        )
        grid.add_row(
            Text(label), str(cell.length), f"{cell.exact}/{cell.prompts}",
            *(str(cell.tasks[task]) for task in tasks), *map(share_text, shares), f"{cell.passes:.1f}",
        )
    return grid


def _caption(table: Table) -> str:
    if table.whole:
        return "pairs: row-key pairs attended to; rows: rows computed; % of dense, all passes."
    return "density: context tokens loaded, bytes read: with metadata; % of dense. * without pass 0."
