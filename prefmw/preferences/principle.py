"""A profile in words: the principle text that Linear Alignment and preference prompting read, and Drift's dials.

Source: Linear Alignment (papers index in docs/architecture.md), Appendix B, "Personal preference evaluation prompts":
the sentence about the person who asked. The pole sentences after it are prefmw's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from prefmw.preferences.dimensions import Dimensions
from prefmw.preferences.profile import Profile

THRESHOLD = 0.15
"""The least size of a weight that is put into words."""

PERSONA_SENTENCE = (
    "The person who asked the question is {persona}, your answer needs to take his(her) needs into account."
)


def principle_text(profile: Profile, dimensions: Dimensions) -> str:
    """The profile as instructions to a model, or ``""`` where it has neither a persona nor a telling weight.

    The persona in the paper's words, then one pole sentence for every effective style weight of at least
    :data:`THRESHOLD` in size, strongest first (ties in the registry's order). The same profile always gives the same
    text; a weight's size decides whether and where its sentence stands, not how it is worded. A weight on the side of a
    pole that the dimension lacks, stored before the registry changed, asks for nothing.
    """
    told = [dial.principle for dial in dials_of(profile, dimensions) if abs(dial.weight) >= THRESHOLD]
    return " ".join(filter(None, [persona_sentence(profile), *told]))


def persona_sentence(profile: Profile) -> str:
    """The persona in the paper's words, or ``""`` where there is none."""
    persona = " ".join(profile.persona.split()).rstrip(".")
    return PERSONA_SENTENCE.format(persona=persona) if persona else ""


class Dial(NamedTuple):
    """A style weight that is not 0, with the sentence of the pole it leans to and how far half a weight goes there."""

    dimension: str
    weight: float
    principle: str
    midpoint: float = 0.5

    def as_json(self) -> dict[str, Any]:
        """The dial but for its dimension."""
        return {"weight": self.weight, "principle": self.principle, "midpoint": self.midpoint}


def dials_of(profile: Profile, dimensions: Dimensions) -> list[Dial]:
    """The profile's effective style weights as dials, strongest first (ties in the registry's order)."""
    weights = {key: profile.weights[key].value for key in dimensions if key in profile.weights}
    found = [
        Dial(key, value, pole.principle, pole.midpoint)
        for key, value in weights.items()
        if value and dimensions[key].kind == "style" and value >= dimensions[key].low
        for pole in [dimensions[key].pole(value)]
    ]
    return sorted(found, key=lambda dial: -abs(dial.weight))
