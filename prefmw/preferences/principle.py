"""The principle text: a profile in words, as Linear Alignment and preference prompting read it.

Source: Linear Alignment (papers index in docs/architecture.md), Appendix B, "Personal preference evaluation prompts":
the sentence about the person who asked. The pole sentences after it are prefmw's own.
"""

from __future__ import annotations

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
    sentences = []
    if profile.persona:
        persona = " ".join(profile.persona.split()).rstrip(".")
        sentences.append(PERSONA_SENTENCE.format(persona=persona))
    weights = profile.weights
    telling = [key for key in dimensions if key in weights and abs(weights[key].value) >= THRESHOLD]
    for key in sorted(telling, key=lambda key: -abs(weights[key].value)):
        if dimensions[key].kind == "style" and weights[key].value >= dimensions[key].low:
            sentences.append(dimensions[key].pole(weights[key].value).principle)
    return " ".join(sentences)
