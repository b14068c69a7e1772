"""What a DPA training makes, of what, and how: the recipe, with the paper's numbers as its defaults."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from prefmw.errors import UsageError
from prefmw.preferences.directions import TEMPLATE, DPACard


@dataclass(frozen=True)
class Draws:
    """How replies are sampled.

    Attributes:
        first: replies to each prompt of iteration 1, for diverse rewards.
        first_directions: directions that one of them is kept for.
        directions: directions for each prompt of later iterations.
        replies: replies for each direction, from iteration 2 on; the best of them is learned from.
        originals: whether a prompt's original replies are among those that the best is chosen from. The paper chooses
            from what is drawn alone; a small model draws worse ones than its corpus holds.
        temperature, max_tokens: of the sampling.
        shard: prompts whose replies are written to one file.
    """

    first: int = 80
    first_directions: int = 5
    directions: int = 5
    replies: int = 16
    originals: bool = False
    temperature: float = 1.0
    max_tokens: int = 1024
    shard: int = 32


@dataclass(frozen=True)
class Fit:
    """How every iteration is fitted: of a LoRA of this rank, or of all weights where it is 0.

    ``batch`` is that of all devices together, ``per_device`` of what goes through one at once; with ``packing`` both
    count rows of ``max_tokens`` tokens that many replies share.
    """

    rank: int = 0
    learning_rate: float = 1e-5
    epochs: float = 2.0
    warmup_steps: int = 20
    batch: int = 64
    per_device: int = 1
    packing: bool = True
    max_tokens: int = 4096


@dataclass(frozen=True)
class Corpus:
    """Questions composed of the embedded model's corpus, with so many answers each."""

    prompts: int
    answers: int = 4


@dataclass(frozen=True)
class DPARecipe:
    """What is trained, on what, and how.

    Attributes:
        name: of the checkpoint.
        backbone: the chat model that every iteration starts from.
        reward: the reward model, by path, hub id or an embedded one's name.
        attributes, cone, dimensions, template, term, names, opposites, scale, units: of the card; see
            :class:`prefmw.preferences.DPACard`.
        iterations: after iteration 0, which is conditioned on rewards.
        prompts: most prompts that are used of the data; all by default.
        replay: the share of every iteration's rows, from 1 on, that are original replies under the plain prompt.
        front_prompts, front_directions: held-out prompts, and directions across the cone, that the front is drawn of.
    """

    name: str
    backbone: str
    reward: str
    seed: int = 0
    attributes: tuple[str, ...] = ("helpfulness", "verbosity")
    cone: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"verbosity": (-45.0, 0.0)})
    dimensions: Mapping[str, str] = field(default_factory=dict)
    template: str = TEMPLATE
    term: str = DPACard.term
    names: Mapping[str, str] = field(default_factory=dict)
    opposites: Mapping[str, str] = field(default_factory=dict)
    scale: int = 100
    units: Mapping[str, float] = field(default_factory=dict)
    iterations: int = 4
    prompts: int | None = None
    replay: float = 0.15
    front_prompts: int = 100
    front_directions: int = 5
    corpus: Corpus | None = None
    draws: Draws = field(default_factory=Draws)
    fit: Fit = field(default_factory=Fit)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", tuple(self.attributes))
        object.__setattr__(self, "cone", {name: (float(low), float(high)) for name, (low, high) in self.cone.items()})
        whole = [("first", self.draws.first), ("directions", self.draws.directions), ("replies", self.draws.replies)]
        whole += [("first-directions", self.draws.first_directions), ("scale", self.scale)]
        whole += [("max-tokens", self.draws.max_tokens), ("shard", self.draws.shard), ("batch", self.fit.batch)]
        whole += [("per-device", self.fit.per_device), ("max-tokens", self.fit.max_tokens)]
        whole += [("iterations", self.iterations), ("front-directions", self.front_directions)]
        whole += [("front-prompts", self.front_prompts)]
        for name, value in whole:
            if not isinstance(value, int) or not 1 <= value < 1e9:
                raise UsageError(f"{name} is a whole number of at least 1, got {str(value)[:20]}")
        for name, number in (("learning-rate", self.fit.learning_rate), ("epochs", self.fit.epochs)):
            if not 0 < number < 1e9:
                raise UsageError(f"{name} is above 0, got {number}")
        if not 0 <= self.replay < 1:
            raise UsageError(f"replay is a share below 1, got {self.replay:g}")
        if not 0.01 <= self.draws.temperature <= 100:
            raise UsageError(f"temperature lies in [0.01, 100], got {self.draws.temperature:g}")
        if self.fit.rank < 0 or self.fit.warmup_steps < 0:
            raise UsageError("rank and warmup-steps are 0 or more")
        self.card()  # what is amiss with it is told here

    def card(self, **values: Any) -> DPACard:
        """The card of a checkpoint made by this recipe."""
        known: dict[str, Any] = {
            "name": self.name,
            "attributes": self.attributes,
            "cone": dict(self.cone),
            "dimensions": dict(self.dimensions),
            "template": self.template,
            "term": self.term,
            "names": dict(self.names),
            "opposites": dict(self.opposites),
            "scale": self.scale,
            "units": dict(self.units),
            "weights": "lora" if self.fit.rank else "whole",
            "reward": self.reward,
        }
        return DPACard(**{**known, **values})


def load_dpa_recipe(name: str) -> DPARecipe:
    """A recipe by name, or by the path of a TOML file.

    Raises:
        UsageError: there is none, or it cannot be followed.
    """
    root = Path(str(files("prefmw.training"))) / "recipes" / "dpa"
    path = Path(name) if name.endswith(".toml") else root / f"{name}.toml"
    parts: dict[str, Callable[..., Any]] = {"corpus": Corpus, "draws": Draws, "fit": Fit}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return DPARecipe(**{key: parts[key](**value) if key in parts else value for key, value in table.items()})
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in root.glob("*.toml")))
        raise UsageError(f"no recipe '{name[:80]}'; there is {known}, or name a TOML file") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"the recipe '{name[:80]}' cannot be read: {error}") from error
