"""Pictures of measured steering (extra `eval`: matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefmw.training.styles import AXES


def plot_strengths(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """How followed style and relevance go with Linear Alignment's ratio, an axis a line; prompting is ratio 0.

    The paper's figure 5 shows the same for its step size.

    Args:
        rows: of ``prefmw eval steer --json``, with several strengths of ``linear``.
        path: where the picture goes; its ending names the format.
    """
    from matplotlib.figure import Figure

    linear = sorted((row for row in rows if row["method"] == "linear"), key=lambda row: float(row["strength"]))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for axis in AXES:
        points = [(row["strength"], row["followed"]) for row in linear if row["axis"] == axis]
        left.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=axis)
    whole = [row for row in linear if row["axis"] == "all"]
    ratios = [row["strength"] for row in whole]
    left.plot(ratios, [row["followed"] for row in whole], color="black", linewidth=2.5, label="all")
    left.fill_between(ratios, *zip(*(row["ci95"] for row in whole), strict=True), color="black", alpha=0.12)
    left.set(title="style asked for is followed", xlabel="ratio (0: prompting)", ylabel="share of replies", ylim=(0, 1))
    left.legend(fontsize=8, ncols=2)
    right.plot(ratios, [row["relevance"] for row in whole], color="tab:green", marker="o", label="relevant")
    right.plot(ratios, [row["off_axis"] for row in whole], color="tab:red", marker="o", label="off-axis size")
    right.plot(ratios, [row["repetition"] for row in whole], color="tab:gray", marker="o", label="with a loop")
    right.set(title="what it costs", xlabel="ratio", ylim=(0, 1))
    right.legend(fontsize=8)
    for plot in (left, right):
        plot.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
