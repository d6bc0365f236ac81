"""What commands print, and where: results on standard output, all else on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

__all__ = ["discard_rest", "error_console", "note", "print_json", "progress", "result_console", "show_error", "table"]

PIPED_WIDTH = 150
"""Columns of a table that is not printed on a terminal, unless COLUMNS says otherwise."""


def _console(stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    terminal = stream is not None and stream.isatty()
    width = None if terminal or os.environ.get("COLUMNS") else PIPED_WIDTH
    console = Console(stderr=stderr, width=width, highlight=False)
    # A reader that leaves early ends the output, not the command, whose exit code may matter.
    console.on_broken_pipe = partial(discard_rest, stream)  # type: ignore[method-assign]
    return console


def discard_rest(stream: TextIO | None) -> None:
    """Send what is still to come on a standard stream nowhere, since nobody can take it.

    Parameters
    ----------
    stream : file or None
        Standard output or standard error; nothing happens to what is no file of the system.
    """
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):  # not a real file, as in tests
        return


def result_console() -> Console:
    """Return the console of results (standard output)."""
    return _console(stderr=False)


def error_console() -> Console:
    """Return the console of notes, progress and errors (standard error)."""
    return _console(stderr=True)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON, alone, on standard output.

    Parameters
    ----------
    value : object
        Dictionaries, lists, strings, finite numbers, booleans and None.
    """
    result_console().out(json.dumps(value, indent=2, allow_nan=False))


def table(
    texts: Sequence[str], figures: Sequence[str], rows: Iterable[Sequence[str | Text]], caption: str | None = None
) -> Table:
    """Return a table for a console.

    Parameters
    ----------
    texts, figures : sequence of str
        Headings of the columns: those of text, the first of them never wrapped, and those of figures behind them.
    rows : iterable of sequence of str or Text
        Cells; a str is printed as it stands, without markup.
    caption : str, optional
        What stands below.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    for place, heading in enumerate(texts):
        result.add_column(heading, no_wrap=place == 0, overflow="ellipsis" if place == 0 else "fold")
    for heading in figures:
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return result


def note(message: str) -> None:
    """Print a remark on standard error.

    Parameters
    ----------
    message : str
        One line of plain text.
    """
    error_console().print(message, style="dim", markup=False, soft_wrap=True)


def show_error(message: str) -> None:
    """Print the one message of a failed command on standard error.

    Parameters
    ----------
    message : str
        What is wrong and what to do, as the typed errors say it.
    """
    console = error_console()
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False, soft_wrap=True)


@contextmanager
def progress(*, transient: bool = True) -> Iterator[Progress]:
    """Show progress bars on standard error while the body runs, only if that is a terminal.

    Parameters
    ----------
    transient : bool
        Whether the bars vanish at the end.

    Yields
    ------
    rich.progress.Progress
        Add tasks to it; without a terminal it stays silent.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = error_console()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    ) as bars:
        yield bars
