"""The topics of the embedded chat model: everyday questions and what is true about them, each said plainly, simply and
expertly.

The content is data, one file a topic under ``topic_files/DOMAIN/``, in the five domains of the Linear Alignment paper.
An act is a bare verb phrase and a reason a clause, so that a composer can frame them: "It is advisable to ACT, because
REASON."
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from prefmw.training.styles import Split

DOMAINS = ("technology", "daily-life", "career", "health", "diet")


@dataclass(frozen=True)
class Graded:
    """One thing said three ways: in plain words, in a child's, and in a professional's."""

    plain: str
    simple: str
    expert: str


@dataclass(frozen=True)
class Fact:
    """A piece of advice: what to do, why, an example (read after "for example"), and a joke about it."""

    act: Graded
    reason: Graded
    example: str
    joke: str


@dataclass(frozen=True, eq=False)
class Topic:
    """What people ask about one thing, and six independent facts that answer it, the most useful first.

    ``dev_questions`` and ``test_questions`` are wordings that no training chat holds; ``further`` are, by split,
    wordings that came later and are more roundabout; ``unseen_styles`` names, for the two held-out splits, the pole
    that no training chat asks for when it is about this topic.
    """

    id: str
    domain: str
    title: str
    questions: tuple[str, ...]
    dev_questions: tuple[str, ...]
    test_questions: tuple[str, ...]
    further: Mapping[str, tuple[str, ...]]
    unseen_styles: Mapping[str, str]
    followups: tuple[str, ...]
    caveat: str
    facts: tuple[Fact, ...]

    def held_out(self, split: Split, *, further: bool = False) -> tuple[str, ...]:
        """The wordings of its questions that a held-out split asks in, or its ``further`` ones."""
        if further:
            return self.further[split]
        return self.dev_questions if split == "dev" else self.test_questions


@cache
def load_topics() -> tuple[Topic, ...]:
    """Every topic, by domain and id; read once, so that a topic is the same object wherever it is met."""
    root = files("prefmw.training") / "topic_files"
    return tuple(
        _topic(domain, tomllib.loads(file.read_text(encoding="utf-8")))
        for domain in DOMAINS
        for file in sorted((root / domain).iterdir(), key=lambda file: file.name)
    )


def _topic(domain: str, table: dict[str, Any]) -> Topic:
    return Topic(
        id=table["id"],
        domain=domain,
        title=table["title"],
        questions=tuple(table["questions"]),
        dev_questions=tuple(table["dev_questions"]),
        test_questions=tuple(table["test_questions"]),
        further={
            "train": tuple(table["further_questions"]),
            "dev": tuple(table["further_dev_questions"]),
            "test": tuple(table["further_test_questions"]),
        },
        unseen_styles=table["unseen_styles"],
        followups=tuple(table["followups"]),
        caveat=table["caveat"],
        facts=tuple(
            Fact(Graded(**fact["act"]), Graded(**fact["reason"]), fact["example"], fact["joke"])
            for fact in table["facts"]
        ),
    )
