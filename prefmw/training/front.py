"""The front of a policy: mean rewards on held-out prompts, by direction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefmw.preferences import Message
from prefmw.preferences.directions import DPACard, Vector, spread_directions, with_system
from prefmw.training.dpa_recipe import DPARecipe
from prefmw.training.drawing import Ask, Policy

_log = logging.getLogger(__name__)


def front_of(
    policy: Policy,
    card: DPACard,
    prompts: Sequence[Sequence[Message]],
    recipe: DPARecipe,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """A point a direction across the cone, or of a SteerLM-style model one for each of its targets: ``asked`` and the
    mean ``rewards`` by attribute. The prompts and seeds are the same for all.
    """
    if card.condition == "rewards":
        wanted = [(target, card.reward_prompt(target)) for target in card.targets]
    else:
        wanted = [(one, card.prompt(one)) for one in spread_directions(card, recipe.front_directions)]
    points = []
    for done, (vector, prompt) in enumerate(wanted):
        points.append({"asked": list(vector), "rewards": _mean(policy, prompts, prompt, recipe)})
        progress(done + 1, len(wanted))
    return points


def plain_point(policy: Policy, prompts: Sequence[Sequence[Message]], recipe: DPARecipe) -> list[float]:
    """The mean rewards of a policy's replies without any system prompt of ours."""
    return _mean(policy, prompts, "", recipe)


def _mean(policy: Policy, prompts: Sequence[Sequence[Message]], prompt: str, recipe: DPARecipe) -> list[float]:
    asked = [with_system(messages, prompt) if prompt else list(messages) for messages in prompts]
    drawn = policy.draw([Ask(policy.chat.template.encode(one), seed) for seed, one in enumerate(asked)])
    said = [(messages, one.text) for messages, one in zip(prompts, drawn, strict=True)]
    rewards = policy.scorer.rewards(said, recipe.attributes)  # (R, K)
    return [round(float(value), 3) for value in rewards.mean(0)]


def plot_fronts(metrics: dict[str, Any], path: Path) -> None:
    """The second attribute's mean reward across, the first one's up: an iteration a line, the plain model a cross."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _log.warning("no front was drawn: matplotlib is not installed (pip install 'prefmw[eval]')")
        return
    names: Sequence[str] = metrics["attributes"]
    if len(names) < 2:
        return
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for iteration, points in enumerate(metrics["fronts"]):
        rewards: list[Vector] = sorted((tuple(point["rewards"]) for point in points), key=lambda row: row[1])
        label = "t=0, on rewards" if iteration == 0 else f"t={iteration}"
        axes.plot([row[1] for row in rewards], [row[0] for row in rewards], marker="o", markersize=3, label=label)
    axes.plot(metrics["plain"][1], metrics["plain"][0], "kx", label="before")
    axes.set(xlabel=f"{names[1]} reward", ylabel=f"{names[0]} reward", title="held-out prompts")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
