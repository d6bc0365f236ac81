"""Tables and sentences about comparisons, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparse_dlm_attn_tiny.comparison import PolicyResult

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_dlm_attn_tiny.evaluate import PolicyScore
    from sparse_dlm_attn_tiny.records import TrafficTotal

__all__ = ["bytes_text", "comparison_table", "printable", "score_table", "share_text", "verdict"]

WIDE, MEDIUM = 148, 112
"""Columns from which a table shows every figure, and from which it shows more than the essentials."""

CAPTION = (
    "density: context tokens loaded, % of dense. bytes: pages, page metadata and its building; a share is of "
    "what dense reads. * without pass 0 of each block."
)


def printable(output: bytes | str, limit: int = 48) -> str:
    """Return decoded bytes on one line, with escapes for what has no glyph.

    Parameters
    ----------
    output : bytes or str
        What a model decoded.
    limit : int
        Longest text; what is cut is marked by "...".
    """
    text = output.decode("latin-1") if isinstance(output, bytes) else output
    shown = "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def bytes_text(count: float) -> str:
    """Return a number of bytes with a decimal unit.

    Parameters
    ----------
    count : float
        Bytes.
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def share_text(share: float) -> str:
    """Return a share as percent.

    Parameters
    ----------
    share : float
        0..1, or more where metadata costs more than it saves.
    """
    return f"{100 * share:.1f} %"


def comparison_table(results: Sequence[PolicyResult], width: int) -> Table:
    """Return the table of one prompt.

    Parameters
    ----------
    results : sequence of PolicyResult
        One a policy.
    width : int
        Columns of the console; a narrow one gets fewer figures.
    """
    from rich.text import Text

    judged = any(result.exact is not None for result in results)
    names = ["agrees", "passes", *_traffic_names(width), "time"] if width >= MEDIUM else _traffic_names(width)
    table = _table(["answer"] + ["exact"] * judged, names)
    for result in results:
        cells = [Text(result.choice.label), Text(printable(result.output))]
        if judged:
            cells.append(Text("yes", style="green") if result.exact else Text("NO", style="bold red"))
        totals = (result.everything, result.after_first_pass)
        figures = [figure for total in totals for figure in _traffic_figures(total, width)]
        if width >= MEDIUM:
            figures = [share_text(result.agreement), str(result.passes), *figures, f"{result.seconds:.2f} s"]
        table.add_row(*cells, *figures)
    return table


def _table(texts: Sequence[str], figures: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption=CAPTION, caption_justify="left", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right")
    return table


def _traffic_names(width: int) -> list[str]:
    names = ["bytes"] if width < MEDIUM else ["density", "bytes"]
    if width >= WIDE:
        names.append("of dense")
    return names + [f"{name} *" for name in names]


def _traffic_figures(total: TrafficTotal, width: int) -> list[str]:
    share = share_text(total.byte_share)
    if width < MEDIUM:
        return [share]
    figures = [share_text(total.density), share]
    return [figures[0], bytes_text(total.bytes_read), share] if width >= WIDE else figures


def verdict(results: Sequence[PolicyResult]) -> list[str]:
    """Return what the table says, as sentences.

    Parameters
    ----------
    results : sequence of PolicyResult
        One a policy; `dense` first.
    """
    judged = [result for result in results if result.exact is not None]
    sparse = [result for result in judged[1:] if result.exact]
    lines = []
    if sparse:
        best = min(sparse, key=lambda result: result.everything.byte_share)
        whole, later = best.everything.byte_share, best.after_first_pass.byte_share
        lines.append(
            f"Least read for the expected answer: {best.choice.label}, {share_text(whole)} of the bytes that "
            f"dense reads ({share_text(later)} after pass 0)."
        )
    failed = [result.choice.label for result in judged if not result.exact]
    if failed:
        lines.append(f"Not the expected answer: {', '.join(failed)}.")
    return lines


def score_table(scores: Sequence[PolicyScore], width: int) -> Table:
    """Return the table of an evaluation.

    Parameters
    ----------
    scores : sequence of PolicyScore
        One a policy and budget.
    width : int
        Columns of the console; a narrow one leaves out the tasks.
    """
    from rich.text import Text

    tasks = list(scores[0].tasks) if scores and width >= WIDE else []
    names = ["density", "bytes", "density *", "bytes *"]
    table = _table([], ["exact", *tasks, "agrees", "passes", *names, "time"])
    for score in scores:
        table.add_row(
            Text(score.policy), f"{score.exact}/{score.prompts}",
            *(f"{score.tasks[task]['exact']}/{score.tasks[task]['prompts']}" for task in tasks),
            share_text(score.agreement), f"{score.passes:.1f}", share_text(score.density),
            share_text(score.byte_share), share_text(score.later_density),
            share_text(score.later_byte_share), f"{score.seconds:.1f} s",
        )
    return table
