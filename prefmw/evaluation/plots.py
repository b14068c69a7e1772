"""Pictures of measured steering (extra `eval`: matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefmw.errors import MissingExtraError
from prefmw.evaluation.steer import Condition
from prefmw.preferences import METHODS
from prefmw.training.styles import AXES


def draw_result(result: Mapping[str, Any], path: Path) -> bool:
    """Draw what a result's command is known by, to a file; whether there is a picture of it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("plotting", "eval")
    command, rows = result["command"], result.get("rows", [])
    if command == "steer":
        if any(sum(row["method"] == name and row["axis"] == "all" for row in rows) > 2 for name in ("linear", "pad")):
            plot_strengths(rows, path)
        else:
            plot_methods(rows, path, group="axis", value="followed", label="share of replies that follow the style")
    elif command == "choice":
        if sum(row["method"] == "linear" and row["domain"] == "all" for row in rows) > 2:
            plot_ratios(rows, path)
        else:
            plot_methods(rows, path, group="domain", value="accuracy", label="right answers", chance=0.25)
    elif command == "rewards":
        plot_methods(
            [row for row in rows if row["reward"] != "all"], path, group="reward", value="mean", label="reward"
        )
    elif command == "dials":
        plot_dials(result["dials"], path)
    elif command == "control" and result.get("fronts"):
        plot_control(rows, path)
    else:
        return False
    return True


def plot_methods(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    group: str,
    value: str,
    label: str,
    chance: float | None = None,
) -> None:
    """A panel for each value of ``group``, a line in it for each method with its 95% interval; ``chance`` is dotted."""
    from matplotlib.figure import Figure

    def line(row: Mapping[str, Any]) -> str:
        one = Condition(row["method"], row.get("strength"), row.get("temperature") or 0.0, row.get("top_k"))
        return one.label + (f" at {one.temperature:g}" if row.get("temperature") not in (None, usual) else "")

    shares = value != "mean"
    heats = [row.get("temperature") for row in rows]
    usual = max(set(heats), key=heats.count)
    names = list(dict.fromkeys(map(line, rows)))
    groups = [name for name in dict.fromkeys(row[group] for row in rows) if name != "all"]
    groups = ["all", *groups] if any(row[group] == "all" for row in rows) else groups
    lines, across = -(-len(groups) // 3), min(3, len(groups))
    size = (2.0 + 2.0 * across, 0.5 + lines * (0.6 + 0.24 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, across, sharey=True, sharex=shares, squeeze=False).flatten()
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, groups, strict=False):
        for row in [row for row in rows if row[group] == name]:
            place = len(names) - 1 - names.index(line(row))
            low, high = row["ci95"]
            shade = "tab:gray" if row["method"] in _PLAIN else "tab:orange" if _is_control(row["method"]) else "#008578"
            panel.plot([low, high], [place, place], color=shade, linewidth=2, alpha=0.5)
            panel.plot([row[value]], [place], "o", color=shade, markersize=5)
        if chance is not None:
            panel.axvline(chance, color="black", linestyle=":", linewidth=1)
        panel.set_title(name, fontsize=10, fontweight="bold" if name == "all" else "normal")
        if shares:
            panel.set(xlim=(-0.04, 1.04), xticks=(0, 0.5, 1))
        panel.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(names)), list(reversed(names)))
    figure.supxlabel(label, fontsize=10)
    figure.savefig(path, dpi=110)


_PLAIN = ("none", "prompt")


def _is_control(name: str) -> bool:
    """Whether a row is there to compare with."""
    return name not in METHODS


def plot_ratios(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over Linear Alignment's ratio, a line a domain; the paper's figure 5 has its step there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    panel = figure.subplots()
    chosen = sorted((row for row in rows if row["method"] == "linear"), key=lambda row: float(row["strength"]))
    for domain in dict.fromkeys(row["domain"] for row in chosen):
        points = [row for row in chosen if row["domain"] == domain]
        ratios, values = [row["strength"] for row in points], [row["accuracy"] for row in points]
        if domain == "all":
            panel.plot(ratios, values, color="black", linewidth=2.5, label="all")
            low, high = ([row["ci95"][end] for row in points] for end in (0, 1))
            panel.fill_between(ratios, low, high, color="black", alpha=0.12)
        else:
            panel.plot(ratios, values, marker="o", markersize=3, linewidth=1, label=domain)
    for row in rows:
        if row["domain"] == "all" and row["method"] in _PLAIN:
            panel.axhline(row["accuracy"], color="tab:gray", linestyle="--", linewidth=1)
            panel.annotate(
                row["method"], (chosen[-1]["strength"], row["accuracy"]), fontsize=8, ha="right", va="bottom"
            )
    panel.axhline(0.25, color="black", linestyle=":", linewidth=1)
    panel.set(xlabel="ratio (0: prompting)", ylabel="right answers", ylim=(0, 1))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


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


def plot_control(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The front: mean helpfulness over mean verbosity by the oracles, a policy a line, its points with their intervals.

    Figure 4 of the DPA paper shows the same by the reward model.

    Args:
        rows: of ``prefmw eval control --json``.
        path: where the picture goes; its ending names the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        ours = sorted((row for row in rows if row["policy"] == policy), key=lambda row: float(row["verbosity"]))
        spans = {
            name: [[abs(row[name] - row[f"{name}_ci95"][side]) for row in ours] for side in (0, 1)]
            for name in ("helpfulness", "verbosity")
        }
        left.errorbar(
            [row["verbosity"] for row in ours],
            [row["helpfulness"] for row in ours],
            xerr=spans["verbosity"],
            yerr=spans["helpfulness"],
            marker="o",
            markersize=3,
            linewidth=1 if len(ours) > 2 else 0,
            elinewidth=0.6,
            label=policy,
        )
        turned = [row for row in ours if row["angle"] is not None]
        if turned:
            turned.sort(key=lambda row: float(row["angle"]))
            right.plot([row["angle"] for row in turned], [row["verbosity"] for row in turned], marker="o", label=policy)
            right.fill_between(
                [row["angle"] for row in turned],
                *zip(*(row["verbosity_ci95"] for row in turned), strict=True),
                alpha=0.2,
            )
    left.set(xlabel="verbosity (oracle, 0-100)", ylabel="helpfulness (oracle, 0-100)", title="the front")
    right.set(xlabel="angle asked for, degrees", ylabel="verbosity (oracle, 0-100)", title="what a direction does")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
