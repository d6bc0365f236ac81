"""Pictures: which pages each pass read, and accuracy against bytes read."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_dlm_attn import UnavailableError
from sparse_dlm_attn_tiny.records import PassRecord

if TYPE_CHECKING:
    from sparse_dlm_attn_tiny.evaluate import PolicyScore
    from sparse_dlm_attn_tiny.tables import Cell

__all__ = [
    "accuracy_picture",
    "ascii_heatmap",
    "heatmap",
    "heatmap_picture",
    "pass_name",
    "picture_path",
    "require_matplotlib",
    "table_picture",
]

SHADES = " .:-=+*#%@"
MARKERS = "osD^vP*X"
HostArray = np.ndarray[Any, Any]


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
    edges = [column * pages // columns for column in range(columns + 1)]
    lines = []
    for record, row in zip(passes, values, strict=True):
        cells = [row[left:right].mean() for left, right in pairwise(edges)]
        # A page that anybody read never looks like one that nobody read.
        shades = [SHADES[min(int(np.ceil(cell * (len(SHADES) - 1))), len(SHADES) - 1)] for cell in cells]
        lines.append(f"{pass_name(record):>{margin - 1}} |{''.join(shades)}|")
    if marked_pages:
        marks = [" "] * columns
        for page in marked_pages:
            marks[min(page * columns // pages, columns - 1)] = "^"
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
        axis.set_title(label, loc="left", fontsize=10)
        axis.set_yticks(range(len(passes)), [pass_name(record) for record in passes], fontsize=7)
        for page in marked_pages:
            axis.axvline(page, color="red", linewidth=0.8, linestyle=":")
    axes[-1].set_xlabel("page of the context (dotted: a fact that the answer needs)")
    figure.colorbar(image, ax=axes, label="share of layers and KV heads that loaded it", fraction=0.03)
    return _png(figure)


def accuracy_picture(scores: Sequence[PolicyScore], title: str) -> bytes:
    """Draw exact answers against bytes read, one line a policy, as PNG.

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

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    whole, later = "pass 0 and metadata included", "without pass 0 of each block"
    for axis, label in ((left, whole), (right, later)):
        _draw_accuracy(axis, scores, label == later)
        axis.set_xlabel(f"bytes read, % of dense ({label})")
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    left.set_ylabel("exact answers, %")
    left.set_ylim(-3, 103)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return _png(figure)


def _draw_accuracy(axis: Any, scores: Sequence[PolicyScore], later: bool) -> None:
    by_name: dict[str, list[PolicyScore]] = {}
    for score in scores:
        by_name.setdefault(score.name, []).append(score)
    for number, (name, group) in enumerate(by_name.items()):
        shares = [score.later_byte_share if later else score.byte_share for score in group]
        exact = [100 * score.exact / score.prompts for score in group]
        points = sorted(zip((100 * share for share in shares), exact, strict=True))
        axis.plot(
            *zip(*points, strict=True), label=name, alpha=0.8, marker=MARKERS[number % len(MARKERS)],
            # Large markers first, so that policies with the same figures stay visible.
            markersize=max(10 - number, 4),
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
        for number, (label, group) in enumerate(by_label.items()):
            points = [(100 * cell.later_density, 100 * cell.exact / cell.prompts) for cell in group]
            axis.plot(
                *zip(*points, strict=True), label=label, alpha=0.8, marker=MARKERS[number % len(MARKERS)],
                markersize=max(10 - number, 4), linestyle="-" if len(points) > 1 else "none",
            )
        axis.set_xlabel("context tokens loaded, % of dense (without pass 0 of each block)")
        axis.set_ylabel("exact answers, %")
        axis.set_ylim(-3, 103)
    else:
        _draw_bars(axis, by_label)
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
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


def picture_path(path: Path) -> Path:
    """Return where the picture that belongs to a JSON file goes.

    Parameters
    ----------
    path : pathlib.Path
        The JSON file.
    """
    return path.with_suffix(".png")
