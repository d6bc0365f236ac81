"""Pictures: which pages each pass read, and accuracy against bytes read."""

from __future__ import annotations

import bisect
import importlib.util
import io
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sparse_dlm_attn import UnavailableError
from sparse_dlm_attn_tiny.records import PassRecord

if TYPE_CHECKING:
    from sparse_dlm_attn_tiny.evaluate import PolicyScore
    from sparse_dlm_attn_tiny.tables import Cell

__all__ = [
    "accuracy_lines",
    "accuracy_picture",
    "ascii_heatmap",
    "heatmap",
    "heatmap_picture",
    "pass_name",
    "require_matplotlib",
    "table_picture",
]

SHADES = " .:-=+*#%@"
MARKERS = "osD^vP*X"
SHARE_LIMITS = (-6, 110)
"""Range of an axis from 0 to 100 % that leaves room for numbers beside its points."""
HostArray = np.ndarray[Any, Any]
Lines: TypeAlias = dict[str, list[tuple[float, float, int | None]]]


def require_matplotlib() -> None:
    """Raise `UnavailableError` with the remedy if pictures cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnavailableError(
            "a picture", ["matplotlib is not installed"],
            "Run pip install 'sparse_dlm_attn[plot]'; `show --ascii` works without it.",
        )


def heatmap(passes: Sequence[PassRecord]) -> HostArray:
    """Return what each pass read of each page.

    Parameters
    ----------
    passes : sequence of PassRecord
        Passes of one block.

    Returns
    -------
    numpy.ndarray
        float64 ``(passes, pages)``: share of layers and KV heads that loaded the page, 0..1.
    """
    return np.stack([record.loaded.mean(axis=(0, 1)) for record in passes])


def pass_name(record: PassRecord) -> str:
    """Return how a pass is labelled.

    Parameters
    ----------
    record : PassRecord
        The pass.
    """
    return "save" if record.is_save else f"pass {record.index}"


def ascii_heatmap(
    passes: Sequence[PassRecord], width: int, marked_pages: Sequence[int] = ()
) -> list[str]:
    """Return the heatmap as lines of text.

    Parameters
    ----------
    passes : sequence of PassRecord
        Passes of one block.
    width : int
        Columns to use; several pages share one if there are more, and it shows their mean.
    marked_pages : sequence of int
        Pages to point at below the map (those that hold a needed fact).
    """
    values = heatmap(passes)
    pages = values.shape[1]
    margin = 8
    columns = max(min(pages, width - margin - 2), 1)
    edges = [column * pages // columns for column in range(columns + 1)]  # first page of each column
    lines = []
    for record, row in zip(passes, values, strict=True):
        cells = [row[left:right].mean() for left, right in pairwise(edges)]
        # A page that anybody read never looks like one that nobody read.
        shades = [SHADES[min(int(np.ceil(cell * (len(SHADES) - 1))), len(SHADES) - 1)] for cell in cells]
        lines.append(f"{pass_name(record):>{margin - 1}} |{''.join(shades)}|")
    if marked_pages:
        marks = [" "] * columns
        for page in marked_pages:
            marks[bisect.bisect_right(edges, page) - 1] = "^"
        lines.append((" " * (margin + 1) + "".join(marks)).rstrip())
    return lines


def heatmap_picture(
    panels: Sequence[tuple[str, Sequence[PassRecord]]], marked_pages: Sequence[int], title: str
) -> bytes:
    """Draw one heatmap a policy, as PNG.

    Parameters
    ----------
    panels : sequence of (str, sequence of PassRecord)
        Label and passes of each policy.
    marked_pages : sequence of int
        Pages to point at.
    title : str
        Heading of the picture.

    Raises
    ------
    UnavailableError
        If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.9 + 1.7 * len(panels)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, passes) in zip(axes, panels, strict=True):
        image = axis.imshow(
            heatmap(passes), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1
        )
        axis.set_title(label, loc="left", fontsize=10, pad=12 if marked_pages else None)
        axis.set_yticks(range(len(passes)), [pass_name(record) for record in passes], fontsize=7)
        for first, last in _runs(marked_pages):  # a frame around the pages, and a pointer above them
            axis.axvspan(first - 0.5, last + 0.5, fill=False, edgecolor="red", linewidth=1.2)
            axis.plot(
                (first + last) / 2, 1.05, marker="v", markersize=7, color="red", clip_on=False,
                transform=axis.get_xaxis_transform(),
            )
    marked = " (red: facts that the answer needs)" if marked_pages else ""
    axes[-1].set_xlabel(f"page of the context{marked}")
    figure.colorbar(image, ax=axes, label="share of layers and KV heads that loaded it", fraction=0.03)
    return _png(figure)


def _runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Return first and last page of every run of consecutive pages."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and page <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], page)
        else:
            runs.append((page, page))
    return runs


def accuracy_picture(scores: Sequence[PolicyScore], title: str) -> bytes:
    """Draw exact answers against bytes read, as PNG: one line a policy with its parameters, over budgets.

    Parameters
    ----------
    scores : sequence of PolicyScore
        Results of an evaluation.
    title : str
        Heading of the picture.

    Raises
    ------
    UnavailableError
        If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    whole, later = "all passes, metadata included", "without pass 0 of each block"
    for axis, label in ((left, whole), (right, later)):
        _draw_lines(axis, accuracy_lines(scores, later=label == later))
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("bytes read, % of dense")
        axis.set_xlim(left=-5)
        axis.grid(alpha=0.3)
    left.set_ylabel("exact answers, %")
    left.set_ylim(*SHARE_LIMITS)
    figure.legend(
        *left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3,
        title=_legend_title(scores), title_fontsize=8,
    )
    return _png(figure)


def _legend_title(points: Sequence[PolicyScore | Cell]) -> str | None:
    """Say what the numbers beside points are, if there are any."""
    budgeted = any(point.budget is not None for point in points)
    return "numbers: budget in tokens" if budgeted else None


def accuracy_lines(scores: Sequence[PolicyScore], *, later: bool = False) -> Lines:
    """Return what an accuracy picture draws: a line for each policy and its parameters, over budgets.

    Parameters
    ----------
    scores : sequence of PolicyScore
        Results of an evaluation.
    later : bool
        Whether to leave out pass 0 of each block.

    Returns
    -------
    dict
        Points ``(bytes read in % of dense, exact answers in %, common budget or None)`` by label.
    """
    lines: Lines = {}
    for score in scores:
        share = score.later_byte_share if later else score.byte_share
        point = (100 * share, 100 * score.exact / score.prompts, score.budget)
        lines.setdefault(score.specification, []).append(point)
    return lines


def _draw_lines(axis: Any, lines: Lines) -> None:
    """Draw labelled lines through points ``(x, y, budget)``, each with its budget beside it."""
    below = True  # in turn, since lines run side by side
    for number, (label, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point[2] or 0)
        below = not below if points[0][2] is not None else below
        (line,) = axis.plot(
            [x for x, _, _ in points], [y for _, y, _ in points], label=label, alpha=0.8,
            marker=MARKERS[number % len(MARKERS)], linestyle="-" if len(points) > 1 else "none",
            # Large markers first, so that policies with the same figures stay visible.
            markersize=10 - 6 * number / len(lines),
        )
        for x, y, budget in points:
            if budget is not None:
                axis.annotate(
                    str(budget), (x, y), (0, -7 if below else 7), textcoords="offset points", ha="center",
                    va="top" if below else "bottom", fontsize=7, color=line.get_color(),
                )


def table_picture(cells: Sequence[Cell], title: str) -> bytes:
    """Draw a paper's table as PNG: lines over density where it has budgets, else bars by length.

    Parameters
    ----------
    cells : sequence of Cell
        The table.
    title : str
        Heading of the picture.

    Raises
    ------
    UnavailableError
        If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=11)
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell.label, []).append(cell)
    if any(cell.budget is not None for cell in cells):
        _draw_lines(axis, {
            label: [(100 * c.later_density, 100 * c.exact / c.prompts, c.budget) for c in group]
            for label, group in by_label.items()
        })
        axis.set_xlabel("context tokens loaded, % of dense (without pass 0 of each block)")
        axis.set_ylabel("exact answers, %")
        axis.set_ylim(*SHARE_LIMITS)
    else:
        _draw_bars(axis, by_label)
    axis.grid(alpha=0.3)
    figure.legend(
        *axis.get_legend_handles_labels(), fontsize=8, loc="outside right upper",
        title=_legend_title(cells), title_fontsize=8,
    )
    return _png(figure)


def _draw_bars(axis: Any, by_label: dict[str, list[Cell]]) -> None:
    lengths = sorted({cell.length for group in by_label.values() for cell in group})
    height = 0.8 / len(lengths)
    for number, length in enumerate(lengths):
        here = [[cell for cell in group if cell.length == length] for group in by_label.values()]
        shares = [100 * group[0].exact / group[0].prompts for group in here]
        places = np.arange(len(here)) + (number - (len(lengths) - 1) / 2) * height
        axis.barh(places, shares, height, label=f"{length} bytes")
    axis.set_yticks(range(len(by_label)), list(by_label), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("exact answers, %")
    axis.set_xlim(0, 103)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Without metadata the same figures give the same bytes, whatever the version of matplotlib says.
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
