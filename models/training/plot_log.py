"""Draw the loss curve of a training log: ``python plot_log.py logs/tiny.jsonl loss_curve.png``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def smooth(values: list[float], width: int = 9) -> np.ndarray:
    """Return the running mean of `values`."""
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def main() -> None:
    """Read the log and write the picture."""
    log, picture = map(Path, sys.argv[1:3])
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    seconds = [entry["seconds"] for entry in steps]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label in (("loss", "all masked bytes, weighted"), ("answer_loss", "answer bytes")):
        values = [entry[key] for entry in steps]
        (line,) = axes.plot(seconds, values, alpha=0.25, linewidth=0.7)
        axes.plot(seconds, smooth(values), color=line.get_color(), label=label)
    for entry in entries:
        if entry.get("event") == "stage ends":
            axes.axvline(entry["seconds"], color="grey", linewidth=0.7)
            place = (entry["seconds"] - 4, 4.8)
            axes.annotate(entry["stage"], place, rotation=90, ha="right", va="top", fontsize=8)
    axes.annotate("16384", (seconds[-1] - 4, 4.8), rotation=90, ha="right", va="top", fontsize=8)
    axes.set(xlabel="seconds of training", ylabel="cross-entropy, nats per byte", yscale="log")
    axes.legend(loc="lower left")
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main()
