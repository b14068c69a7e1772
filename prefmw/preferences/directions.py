"""DPA's arithmetic: a person's weights as a direction in reward space, and the system prompt that says so to a model.

A checkpoint's card names its attributes, the first of which is the one that is always wanted. A direction v is a unit
vector over them; its angle to every further attribute k is atan2(v_k, v_1), and the cone that a checkpoint was trained
in is a range of angles for each. Directions are written as integers, ``round(scale v)``.

Source: Wang et al., "Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with
Multi-Objective Rewards", section 2.2 and 3.1; prompt and integers as in the released code.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from prefmw.errors import ModelError, UsageError, nearest
from prefmw.preferences.profile import Message, Profile

DPA_CARD = "dpa.json"
"""The file that holds a checkpoint's card."""

FORMAT = 1
"""Of the card."""

TEMPLATE = (
    "You are a helpful, respectful, and honest assistant who always responds to the user in a harmless way. Your "
    "response should maximize weighted rating = {rating}"
)
"""The released system prompt; ``{rating}`` is ``helpfulness*97 + verbosity*-26``, say."""

REWARD_TEMPLATE = "Your response should have these ratings: {rating}"
"""That of a SteerLM-style model: ``helpfulness=80, verbosity=35``, of 100. The paper prints none, so it is ours."""

NEAR = 30.0
"""Degrees around a direction that its neighbours lie within."""

Vector = tuple[float, ...]
"""Numbers by attribute, in the order of the card."""


@dataclass(frozen=True)
class DPACard:
    """What a DPA checkpoint is.

    Attributes:
        name: as replies name it.
        attributes: what its directions are over; the first is the one that is always wanted.
        cone: for every further attribute the least and the greatest angle it was trained with, degrees in (-90, 90).
        dimensions: by attribute, the dimension whose weight it takes; an attribute that is left out takes its own
            name's.
        template: the system prompt, with ``{rating}`` in it.
        term: how an attribute stands in the rating, with ``{name}`` and ``{value}`` in it; terms are joined by `` + ``.
        names: by attribute, what it is called there; its own name where it is left out.
        opposites: by attribute, what less of it is called there, for a model that reads words better than signs: a
            negative value stands as a positive one of that, ``6 * concise`` for ``-6 * detailed``.
        scale: what a unit is written as, and a reward of 100.
        units: by attribute, what a point of its reward counts for in v . r; 1 where it is left out.
        condition: ``direction``, or ``rewards`` for a SteerLM-style model, whose prompt names the rewards wanted.
        weights: ``lora`` on a chat model, or ``whole``: the checkpoint is a chat model itself.
        backbone: of a LoRA, the model that it was trained on.
        reward: the reward model that knows the attributes, by path, hub id or an embedded one's name.
        targets: of a SteerLM-style model, rewards that go together, one row for each.
        training: how it was made.
    """

    name: str
    attributes: tuple[str, ...] = ("helpfulness", "verbosity")
    cone: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"verbosity": (-45.0, 0.0)})
    dimensions: Mapping[str, str] = field(default_factory=dict)
    template: str = TEMPLATE
    term: str = "{name}*{value}"
    names: Mapping[str, str] = field(default_factory=dict)
    opposites: Mapping[str, str] = field(default_factory=dict)
    scale: int = 100
    units: Mapping[str, float] = field(default_factory=dict)
    condition: str = "direction"
    weights: str = "lora"
    backbone: Mapping[str, Any] = field(default_factory=dict)
    reward: str = ""
    targets: tuple[Vector, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise UsageError("a DPA checkpoint names at least one attribute, and each once")
        for name in (*self.cone, *self.dimensions, *self.names, *self.opposites, *self.units):
            if name not in self.attributes:
                raise UsageError(f"no attribute '{name[:40]}': {nearest(name[:40], self.attributes)}")
        if missing := set(self.attributes[1:]) - set(self.cone):
            raise UsageError(
                f"the cone has no angles for {', '.join(sorted(missing))}; give the least and the greatest"
            )
        for name, (low, high) in self.cone.items():
            if name == self.attributes[0] or not -90 < low <= high < 90:
                raise UsageError(
                    f"the cone's angles are those of further attributes to '{self.attributes[0]}', the least and then "
                    f"the greatest, in (-90, 90) degrees; got {name}: {low:g} to {high:g}"
                )
        if "{rating}" not in self.template:
            raise UsageError("a DPA template holds {rating}")
        if "{name}" not in self.term or "{value}" not in self.term:
            raise UsageError("a term of a DPA prompt holds {name} and {value}")
        if self.condition not in ("direction", "rewards") or self.weights not in ("lora", "whole"):
            raise UsageError("a card's condition is direction or rewards, and its weights are lora or whole")

    @property
    def angles(self) -> list[tuple[float, float]]:
        """The cone's angles, in the order of the further attributes."""
        return [self.cone[name] for name in self.attributes[1:]]

    def value(self, vector: Sequence[float], rewards: Sequence[float]) -> float:
        """v . r, each reward in its unit."""
        return sum(
            v * self.units.get(name, 1.0) * r for name, v, r in zip(self.attributes, vector, rewards, strict=True)
        )

    def dimension(self, attribute: str) -> str:
        """The dimension whose weight an attribute takes."""
        return self.dimensions.get(attribute, attribute)

    def prompt(self, vector: Sequence[float]) -> str:
        """The system prompt of a direction."""
        terms = []
        for name, value in zip(self.attributes, vector, strict=True):
            called, number = self.names.get(name, name), round(self.scale * value)
            if number < 0 and name in self.opposites:
                called, number = self.opposites[name], -number
            terms.append(self.term.replace("{name}", called).replace("{value}", str(number)))
        return self.template.replace("{rating}", " + ".join(terms))

    def reward_prompt(self, rewards: Sequence[float]) -> str:
        """The system prompt of a SteerLM-style model that asks for these rewards, 0-100."""
        names = [self.names.get(name, name) for name in self.attributes]
        terms = (f"{name}={round(self.scale * value / 100)}" for name, value in zip(names, rewards, strict=True))
        return self.template.replace("{rating}", ", ".join(terms))

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> DPACard:
        """What :meth:`to_json` wrote.

        Raises:
            UsageError, ValueError, TypeError, KeyError, AttributeError: it is something else.
        """
        table = json.loads(text)
        if table.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        table["attributes"] = tuple(table["attributes"])
        table["cone"] = {name: (float(low), float(high)) for name, (low, high) in table["cone"].items()}
        table["targets"] = tuple(tuple(map(float, row)) for row in table.get("targets", ()))
        return DPACard(**table)


RELEASED = DPACard(
    name="DPA-v1-Mistral-7B",
    weights="whole",
    reward="Haoxiang-Wang/RewardModel-Mistral-7B-for-DPA-v1",
)
"""The authors' checkpoint, which has no card of its own."""

PRESETS = {"Haoxiang-Wang/DPA-v1-Mistral-7B": RELEASED}
"""Cards of released checkpoints, by hub id."""


def read_card(folder: Path) -> DPACard | None:
    """The card in a folder; ``None`` where there is none.

    Raises:
        ModelError: it is none, or is cut short.
    """
    file = folder / DPA_CARD
    if not file.is_file():
        return None
    try:
        return DPACard.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, UsageError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"'{file}' is no DPA checkpoint's card, or is cut short: {reason}") from error


class Direction(NamedTuple):
    """A direction over a checkpoint's attributes: as somebody's weights say it, and the nearest in the trained cone."""

    attributes: tuple[str, ...]
    asked: Vector
    applied: Vector
    prompt: str

    @property
    def is_projected(self) -> bool:
        """Whether the one applied is another than the one asked for."""
        return math.dist(self.asked, self.applied) > 1e-9

    def as_json(self) -> dict[str, Any]:
        """Both, by attribute, the angles of the one applied, and the prompt."""

        def named(vector: Vector) -> dict[str, float]:
            return {name: round(value, 4) for name, value in zip(self.attributes, vector, strict=True)}

        angles = zip(self.attributes[1:], angles_of(self.applied), strict=True)
        return {
            "asked": named(self.asked),
            "applied": named(self.applied),
            "angles": {name: round(angle, 2) for name, angle in angles},
            "projected": self.is_projected,
            "prompt": self.prompt,
        }


def direction_of(profile: Profile, card: DPACard) -> Direction:
    """A person's direction: their weights on the card's attributes, as a unit vector.

    An unset first attribute is no zero that somebody chose: it is what completes the others to length 1, so that
    verbosity -0.6 is (0.8, -0.6), the paper's own example. Other unset attributes are 0.

    Raises:
        UsageError: all weights are 0.
    """
    weights = profile.weights
    given = [weights.get(card.dimension(name)) for name in card.attributes]
    values = [0.0 if weight is None else weight.value for weight in given]
    if given[0] is None:
        values[0] = math.sqrt(max(0.0, 1 - sum(value * value for value in values[1:])))
    asked = unit(values)
    applied = project(asked, card)
    return Direction(card.attributes, asked, applied, card.prompt(applied))


def written(attributes: Sequence[str], vector: Sequence[float]) -> str:
    """A direction for a person: ``helpfulness +0.80, verbosity -0.60``."""
    return ", ".join(f"{name} {value:+.2f}" for name, value in zip(attributes, vector, strict=True))


def about_direction(direction: Direction, profile: Profile, card: DPACard) -> list[str]:
    """What there is to tell of a direction that is not just what a person's weights say."""
    known, notices = [card.dimension(name) for name in card.attributes], []
    if not any(key in profile.weights for key in known):
        notices.append(
            f"{profile.user_id} has no weight on {' or '.join(known)}, so the direction is {card.attributes[0]} alone"
        )
    if direction.is_projected:
        asked, applied = (written(direction.attributes, vector) for vector in (direction.asked, direction.applied))
        notices.append(
            f"the direction {asked} lies outside what '{card.name}' was trained on; the nearest is {applied}"
        )
    if other := [key for key, weight in profile.weights.items() if key not in known and weight.value]:
        notices.append(f"'{card.name}' knows no {' or '.join(other)}; under dpa that has no effect")
    if profile.persona:
        notices.append("under dpa a persona has no effect: directions are numbers alone")
    return notices


def unit(values: Sequence[float]) -> Vector:
    """The numbers as a unit vector.

    Raises:
        UsageError: all are 0, or one is not finite.
    """
    size = math.hypot(*values)
    if not math.isfinite(size) or size < 1e-9:
        raise UsageError(
            "a direction of zeros points nowhere; give one of its attributes a weight other than 0, or unset them all"
        )
    return tuple(value / size for value in values)


def angles_of(vector: Sequence[float]) -> list[float]:
    """The angle of every further attribute to the first, in degrees."""
    return [math.degrees(math.atan2(value, vector[0])) for value in vector[1:]]


def from_angles(angles: Sequence[float]) -> Vector:
    """The direction with these angles, in (-90, 90) degrees; of two attributes (cos a, sin a)."""
    return unit([1.0, *(math.tan(math.radians(angle)) for angle in angles)])


def project(vector: Sequence[float], card: DPACard) -> Vector:
    """The direction in the card's cone with the least angle to ``vector``, which is returned as it is where it lies
    inside.

    The cone is convex, so the nearest point of it has the nearest direction::

        min over s >= 0, s tan(low_k) <= u_k <= s tan(high_k)  of  (s - v_1)^2 + sum_k (u_k - v_k)^2

    which is convex in s once u_k is v_k clipped to its range. Where that point is 0, an edge is nearest.
    """
    found = unit(vector)
    bounds = [(math.tan(math.radians(low)), math.tan(math.radians(high))) for low, high in card.angles]
    first, rest = found[0], found[1:]

    def clipped(size: float) -> list[float]:
        return [max(size * low, min(size * high, value)) for value, (low, high) in zip(rest, bounds, strict=True)]

    def distance(size: float) -> float:
        return math.dist([size, *clipped(size)], found)

    if first > 0 and math.dist(clipped(first), rest) < 1e-12:
        return found
    low, high = 0.0, 1.0  # a projection is no longer than what it is of
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if distance(left) <= distance(right) else (left, high)
    if low > 1e-6:
        return unit([low, *clipped(low)])
    edges = [unit([1.0, *corner]) for corner in product(*bounds)]
    return max(edges, key=lambda edge: sum(a * b for a, b in zip(edge, found, strict=True)))


def draw_direction(card: DPACard, rng: random.Random, near: Sequence[float] | None = None) -> Vector:
    """A direction whose angles are uniform over the cone's (section 3.1), or over that part of them that lies within
    :data:`NEAR` degrees of those of ``near``; where none of an angle's range does, its nearest end is taken.
    """
    centre = angles_of(near) if near is not None else None
    drawn = []
    for place, (low, high) in enumerate(card.angles):
        if centre is not None:
            least, most = centre[place] - NEAR, centre[place] + NEAR
            low, high = min(max(low, least), high), max(min(high, most), low)
        drawn.append(rng.uniform(low, high))
    return from_angles(drawn)


def spread_directions(card: DPACard, count: int) -> list[Vector]:
    """``count`` directions at equal steps across the cone, every further attribute from its greatest angle down."""
    steps = [index / max(1, count - 1) for index in range(count)]
    return [from_angles([high - step * (high - low) for low, high in card.angles]) for step in steps]


def with_system(messages: Sequence[Message], prompt: str) -> list[Message]:
    """The conversation under a checkpoint's own system prompt, behind the one that it brings, where it brings one."""
    brought = [message.content for message in messages if message.role == "system" and message.content]
    system = Message("system", "\n\n".join([*brought, prompt]))
    return [system, *(message for message in messages if message.role != "system")]
