"""Pictures of measured steering (extra `eval`: matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefmw.training.styles import AXES


def plot_strengths(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """How followed style and relevance go with Linear Alignment's ratio or PAD's beta, an axis a line; prompting is 0.

    Figure 5 of either paper shows the same for its step size or beta.

    Args:
        rows: of ``prefmw eval steer --json``, with several strengths of ``linear``, or else of ``pad``.
        path: where the picture goes; its ending names the format.
    """
    from matplotlib.figure import Figure

    method = "linear" if sum(row["method"] == "linear" and row["axis"] == "all" for row in rows) > 1 else "pad"
    symbol = {"linear": "ratio", "pad": "beta"}[method]
    chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: float(row["strength"]))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for axis in AXES:
        points = [(row["strength"], row["followed"]) for row in chosen if row["axis"] == axis]
        left.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=axis)
    whole = [row for row in chosen if row["axis"] == "all"]
    ratios = [row["strength"] for row in whole]
    left.plot(ratios, [row["followed"] for row in whole], color="black", linewidth=2.5, label="all")
    left.fill_between(ratios, *zip(*(row["ci95"] for row in whole), strict=True), color="black", alpha=0.12)
    left.set(
        title="style asked for is followed", xlabel=f"{symbol} (0: prompting)", ylabel="share of replies", ylim=(0, 1)
    )
    left.legend(fontsize=8, ncols=2)
    right.plot(ratios, [row["relevance"] for row in whole], color="tab:green", marker="o", label="relevant")
    right.plot(ratios, [row["off_axis"] for row in whole], color="tab:red", marker="o", label="off-axis size")
    right.plot(ratios, [row["repetition"] for row in whole], color="tab:gray", marker="o", label="with a loop")
    right.set(title="what it costs", xlabel=symbol, ylim=(0, 1))
    right.legend(fontsize=8)
    for plot in (left, right):
        plot.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_dials(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """How each axis' measure goes with its weight, a line a gain, an axis a panel.

    Args:
        rows: ``dials`` of ``prefmw eval dials --json``.
        path: where the picture goes; its ending names the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharex=True, sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        for gain in dict.fromkeys(row["strength"] for row in rows):
            turned = [row for row in rows if row["axis"] == axis and row["strength"] == gain]
            weights = [row["weight"] for row in turned]
            panel.plot(weights, [row["mean"] for row in turned], marker="o", markersize=3, label=f"gain {gain:g}")
            panel.fill_between(weights, *zip(*(row["ci95"] for row in turned), strict=True), alpha=0.15)
        panel.set(title=axis, xlabel="weight", ylim=(-1, 1), xticks=(-1, 0, 1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("measure")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
