"""Tables and sentences about comparisons, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from sparse_dlm_attn.cli.console import table
from sparse_dlm_attn_small_model.comparison import PolicyResult, PolicyScore
from sparse_dlm_attn_small_model.records import TrafficTotal

WIDE, MEDIUM = 148, 112
"""Columns from which a table shows every figure, and from which it shows more than the essentials."""

CAPTION = (
    "density: context tokens loaded, % of dense. bytes: pages, page metadata and its building; a share is of "
    "what dense reads. * without pass 0 of each block."
)


def printable(output: bytes, limit: int = 48) -> str:
    """Return decoded bytes on one line of at most ``limit``, with escapes for what has no glyph."""
    shown = "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in output.decode("latin-1"))
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def bytes_text(count: float) -> str:
    """Return a number of bytes with a decimal unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def share_text(share: float) -> str:
    """Return a share as percent."""
    return f"{100 * share:.1f} %"


def comparison_table(results: Sequence[PolicyResult], width: int) -> Table:
    """Return the table of one prompt; a narrow console gets fewer figures."""
    judged = any(result.exact is not None for result in results)
    marks = {True: Text("yes", style="green"), False: Text("NO", style="bold red"), None: Text("")}
    names = ["bytes"] if width < MEDIUM else ["density", "bytes", "of dense"][: 3 if width >= WIDE else 2]
    names += [f"{name} *" for name in names]
    rows: list[list[str | Text]] = []
    for result in results:
        figures = [*_figures(result.everything, width), *_figures(result.after_first_pass, width)]
        if width >= MEDIUM:
            figures = [share_text(result.agreement), str(result.passes), *figures, f"{result.seconds:.2f} s"]
        mark = [marks[result.exact]] if judged else []
        rows.append([result.choice.label, printable(result.output), *mark, *figures])
    if width >= MEDIUM:
        names = ["agrees", "passes", *names, "time"]
    return table(["policy", "answer"] + ["exact"] * judged, names, rows, CAPTION)


def _figures(total: TrafficTotal, width: int) -> list[str]:
    """Return what a table of some width shows of a total."""
    share = share_text(total.byte_share)
    if width < MEDIUM:
        return [share]
    return [share_text(total.density), *([bytes_text(total.bytes_read)] if width >= WIDE else []), share]


def verdict(results: Sequence[PolicyResult]) -> list[str]:
    """Return what the table says, as sentences; `dense` is the first result."""
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
    """Return the table of an evaluation; a narrow console gets no column a task."""
    tasks = list(scores[0].tasks) if scores and width >= WIDE else []
    rows = [
        [
            score.choice.label,
            f"{score.exact}/{score.prompts}",
            *(f"{score.tasks[task]['exact']}/{score.tasks[task]['prompts']}" for task in tasks),
            share_text(score.agreement),
            f"{score.passes:.1f}",
            *(
                share_text(share)
                for total in (score.everything, score.after_first_pass)
                for share in (total.density, total.byte_share)
            ),
            f"{score.seconds:.1f} s",
        ]
        for score in scores
    ]
    names = ["density", "bytes", "density *", "bytes *", "time"]
    return table(["policy"], ["exact", *tasks, "agrees", "passes", *names], rows, CAPTION)
