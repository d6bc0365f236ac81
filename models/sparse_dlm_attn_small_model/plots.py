"""Pictures: which pages each pass read, and accuracy against what was read."""

from __future__ import annotations

import bisect
import importlib.util
import io
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, TypeAlias

import numpy as np

from sparse_dlm_attn import UnavailableError
from sparse_dlm_attn_small_model.comparison import PolicyScore
from sparse_dlm_attn_small_model.records import PassRecord

SHADES = " .:-=+*#%@"
MARKERS = "osD^vP*X"
SHARE_LIMITS = (-6, 110)  # of an axis from 0 to 100 %, with room for numbers beside its points
Lines: TypeAlias = dict[str, list[tuple[float, float, int | None]]]


def require_matplotlib() -> None:
    """Raise `UnavailableError` with the remedy if pictures cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnavailableError(
            "a picture",
            ["matplotlib is not installed"],
            "Run pip install 'sparse_dlm_attn[plot]'; `show --ascii` works without it.",
        )


def heatmap(passes: Sequence[PassRecord]) -> np.ndarray[Any, Any]:
    """Return the share of layers and KV heads that loaded each page, float64 ``(passes, pages)``."""
    return np.stack([record.loaded.mean(axis=(0, 1)) for record in passes])


def _name(record: PassRecord) -> str:
    """Return how a pass is labelled."""
    return "save" if record.is_save else f"pass {record.index}"


def ascii_heatmap(passes: Sequence[PassRecord], width: int, marked_pages: Sequence[int] = ()) -> list[str]:
    """Return the heatmap as lines of text of at most ``width`` columns, with ``marked_pages`` pointed at.

    Where there are more pages than columns, several share one, which shows their mean.
    """
    values = heatmap(passes)
    pages, margin = values.shape[1], 8
    columns = max(min(pages, width - margin - 2), 1)
    edges = [column * pages // columns for column in range(columns + 1)]  # first page of each column
    lines = []
    for record, row in zip(passes, values, strict=True):
        cells = [row[left:right].mean() for left, right in pairwise(edges)]
        # A page that anybody read never looks like one that nobody read.
        shades = [SHADES[min(int(np.ceil(cell * (len(SHADES) - 1))), len(SHADES) - 1)] for cell in cells]
        lines.append(f"{_name(record):>{margin - 1}} |{''.join(shades)}|")
    if marked_pages:
        marks = [" "] * columns
        for page in marked_pages:
            marks[bisect.bisect_right(edges, page) - 1] = "^"
        lines.append((" " * (margin + 1) + "".join(marks)).rstrip())
    return lines


def heatmap_picture(
    panels: Sequence[tuple[str, Sequence[PassRecord]]], marked_pages: Sequence[int], title: str
) -> bytes:
    """Draw one heatmap a policy, with its label, as PNG, and point at ``marked_pages``, ascending."""
    drawing = figure(10, 0.9 + 1.7 * len(panels))
    drawing.suptitle(title)
    axes = drawing.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, passes) in zip(axes, panels, strict=True):
        image = axis.imshow(heatmap(passes), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
        axis.set_title(label, loc="left", fontsize=10, pad=12 if marked_pages else None)
        axis.set_yticks(range(len(passes)), [_name(record) for record in passes], fontsize=7)
        # A frame around each run of consecutive pages, and a pointer above it.
        for _, numbered in groupby(enumerate(marked_pages), lambda pair: pair[1] - pair[0]):
            run = [page for _, page in numbered]
            axis.axvspan(run[0] - 0.5, run[-1] + 0.5, fill=False, edgecolor="red", linewidth=1.2)
            axis.plot(
                (run[0] + run[-1]) / 2,
                1.05,
                marker="v",
                markersize=7,
                color="red",
                clip_on=False,
                transform=axis.get_xaxis_transform(),
            )
    marked = " (red: facts that the answer needs)" if marked_pages else ""
    axes[-1].set_xlabel(f"page of the context{marked}")
    drawing.colorbar(image, ax=axes, label="share of layers and KV heads that loaded it", fraction=0.03)
    return png(drawing)


def accuracy_picture(scores: Sequence[PolicyScore], title: str) -> bytes:
    """Draw exact answers against bytes read, as PNG: one line a policy with its parameters, over budgets."""
    drawing = figure(10, 5.6)
    drawing.suptitle(title)
    left, right = drawing.subplots(1, 2, sharey=True)
    whole, later = "all passes, metadata included", "without pass 0 of each block"
    for axis, label in ((left, whole), (right, later)):
        _draw_lines(axis, accuracy_lines(scores, later=label == later))
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("bytes read, % of dense")
        axis.set_xlim(left=-5)
        axis.grid(alpha=0.3)
    left.set_ylabel("exact answers, %")
    left.set_ylim(*SHARE_LIMITS)
    budgeted = any(score.choice.budget is not None for score in scores)
    drawing.legend(
        *left.get_legend_handles_labels(),
        fontsize=8,
        loc="outside lower center",
        ncols=3,
        title="numbers: budget in tokens" if budgeted else None,
        title_fontsize=8,
    )
    return png(drawing)


def accuracy_lines(scores: Sequence[PolicyScore], *, later: bool = False) -> Lines:
    """Return what an accuracy picture draws: a line for each policy and its parameters, over budgets.

    Its points are (bytes read in % of dense, exact answers in %, common budget or None); ``later`` leaves
    out pass 0 of each block.
    """
    lines: Lines = {}
    for score in scores:
        total = score.after_first_pass if later else score.everything
        point = (100 * total.byte_share, 100 * score.exact / score.prompts, score.choice.budget)
        lines.setdefault(score.choice.specification, []).append(point)
    return lines


def _draw_lines(axis: Any, lines: Lines) -> None:
    """Draw the lines of `accuracy_lines`, each point with its budget beside it."""
    below = True  # in turn, since lines run side by side
    for number, (label, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point[2] or 0)
        below = not below if points[0][2] is not None else below
        (line,) = axis.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            label=label,
            alpha=0.8,
            marker=MARKERS[number % len(MARKERS)],
            linestyle="-" if len(points) > 1 else "none",
            # Large markers first, so that policies with the same figures stay visible.
            markersize=10 - 6 * number / len(lines),
        )
        for x, y, budget in points:
            if budget is not None:
                axis.annotate(
                    str(budget),
                    (x, y),
                    (0, -7 if below else 7),
                    textcoords="offset points",
                    ha="center",
                    va="top" if below else "bottom",
                    fontsize=7,
                    color=line.get_color(),
                )


def figure(width: float, height: float) -> Any:
    """Return an empty figure of some inches."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    """Return a figure as PNG: the same figures give the same bytes, whatever the version of matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
