"""Questions and people for measuring how well a method steers, in wordings and combinations that the embedded model was
not trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from prefmw.preferences import Profile, Source, Weight
from prefmw.training.styles import AXES, POLES, Split, load_styles, load_talk, pole_name
from prefmw.training.topics import Topic, load_topics

Kind = Literal["persona", "indirect", "request", "unseen"]
KINDS: tuple[Kind, ...] = ("persona", "indirect", "request", "unseen")
"""How a preference is known: a persona that states it, one that only implies it, a request kept as persona, or weights,
whose pole sentences training knows but never saw together, or never asked of that topic."""

LATER = 0.25
"""The share of items that are measured on the second turn of a conversation."""


@dataclass(frozen=True)
class Item:
    """One question of one person.

    Attributes:
        topic: what is asked about.
        question: in a wording that training does not hold.
        more: the user's second turn, whose reply is measured; empty where the first one's is.
        profile: the person.
        wanted: the poles that the profile asks for, by axis; ``axis`` is the one measured.
    """

    topic: Topic
    question: str
    more: str
    profile: Profile
    axis: str
    wanted: dict[str, int]
    kind: Kind

    @property
    def preference(self) -> str:
        """What the person's preference is known by: the unit that intervals resample."""
        return self.profile.persona or "+".join(pole_name(axis, sign) for axis, sign in sorted(self.wanted.items()))


def held_out_items(split: Split, per_axis: int, *, seed: int = 0, further: bool = False) -> Iterator[Item]:
    """``per_axis`` items for each axis, both poles and all kinds in turn; the same seed gives the same items.

    ``further`` takes the later, more roundabout questions and personas instead.
    """
    rng = random.Random(f"{split}:{seed}:items")
    for axis in AXES:
        for index in range(per_axis):
            yield _item(split, axis, (-1, 1)[index % 2], KINDS[index // 2 % len(KINDS)], rng, further)


def _item(split: Split, axis: str, sign: int, kind: Kind, rng: random.Random, further: bool) -> Item:
    topics, talk = list(load_topics()), load_talk()
    name = pole_name(axis, sign)
    wanted = {axis: sign}
    persona = ""
    if kind == "unseen":
        pairs = [pair for pair in load_styles().unseen_pairs[split] if name in pair]
        if pairs and rng.random() < 0.5:
            (other,) = rng.choice(pairs) - {name}
            wanted.update({key: 1 if other == POLES[key][1] else -1 for key in AXES if other in POLES[key]})
        else:
            topics = [topic for topic in topics if topic.unseen_styles[split] == name]
    else:
        wordings = load_styles().wordings[split][name]
        options = {"persona": wordings.personas, "indirect": wordings.indirect, "request": wordings.requests}
        if further:
            options |= {"persona": wordings.further_personas, "indirect": wordings.further_indirect}
        persona = rng.choice(options[kind])
    topic = rng.choice(topics)
    more = ""
    if rng.random() < LATER:
        more = rng.choice(talk.small["asking"]["more"][split])
    return Item(
        topic=topic,
        question=rng.choice(topic.held_out(split, further=further)),
        more=more,
        profile=profile_of(wanted if kind == "unseen" else {}, persona),
        axis=axis,
        wanted=wanted,
        kind=kind,
    )


def profile_of(weights: dict[str, int] | dict[str, float], persona: str = "") -> Profile:
    """A person with these weights, as if they had set them, and this persona."""
    now = datetime.now(UTC)
    layers = tuple(Weight(axis, Source.user, float(value), 1.0, now) for axis, value in weights.items())
    return Profile("held-out", persona, revision=1, layers=layers)
