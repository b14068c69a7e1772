"""Do the dials turn? Drift at every weight from -1 to 1, an axis at a time, and three axes at once.

Held-out questions are asked of people who differ in their weights alone, with the same seed at every weight, and the
oracles (:mod:`prefmw.evaluation.oracles`) read the replies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefmw.evaluation.content import read_content, repeats
from prefmw.evaluation.held_out import profile_of
from prefmw.evaluation.oracles import followed, measure
from prefmw.evaluation.runs import Run
from prefmw.evaluation.statistics import cluster_interval
from prefmw.evaluation.steer import Condition, replies_to
from prefmw.preferences import Dimensions, Message
from prefmw.steering import Backend
from prefmw.training.styles import AXES, Split
from prefmw.training.topics import Topic, load_topics

WEIGHTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
AT_ONCE = 3

Asked = tuple[Topic, str, dict[str, float]]
"""A topic, a question about it, and the weights of who asks."""


@dataclass(frozen=True)
class Trial:
    """What is asked ``n`` times, of whom, and of which model; ``progress`` is told of every reply; a ``run`` that goes
    on has some of them.
    """

    split: Split
    n: int
    backend: Backend
    dimensions: Dimensions
    seed: int = 0
    progress: Callable[[int], None] = lambda count: None
    run: Run = field(default_factory=lambda: Run("dials", {}))

    def questions(self, what: str) -> list[tuple[Topic, str]]:
        """Held-out questions, the same for the same ``what``."""
        rng = random.Random(f"{self.split}:{self.seed}:{what}:questions")
        drawn = []
        for _ in range(self.n):
            topic = rng.choice(load_topics())
            drawn.append((topic, rng.choice(topic.held_out(self.split))))
        return drawn

    def answers(self, asked: Sequence[Asked], condition: Condition, what: str) -> list[str]:
        """The replies, many at a time; the run keeps them as ``what`` under that condition."""
        texts: list[str] = self.run.unit(f"{what}: {condition!r}", lambda: self._ask(asked, condition))
        return texts

    def _ask(self, asked: Sequence[Asked], condition: Condition) -> list[str]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            self.progress(count - done)
            done = count

        conversations = [[Message("user", question)] for _, question, _ in asked]
        profiles = [profile_of(weights) for _, _, weights in asked]
        return replies_to(conversations, profiles, condition, self.backend, self.dimensions, self.seed, advance)[0]

    def interval(self, values: Sequence[float], questions: Sequence[str]) -> list[float]:
        """The 95% interval of a mean over questions."""
        return [round(end, 4) for end in cluster_interval(values, questions, seed=self.seed)]


def dial_rows(trial: Trial, conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Per condition and axis one row a weight, ``trial.n`` replies each.

    ``mean`` is the oracle's, in [-1, 1], with a 95% interval over questions; ``off_axis`` the mean size of the other
    axes' measures.
    """
    rows = []
    for condition in conditions:
        for axis in AXES:
            questions = trial.questions(axis)
            for weight in WEIGHTS:
                asked = [(topic, question, {axis: weight}) for topic, question in questions]
                texts = trial.answers(asked, condition, f"{axis} {weight:+g}")
                measures = [measure(text) for text in texts]
                values = [one[axis] for one in measures]
                others = [abs(one[other]) for one in measures for other in AXES if other != axis]
                rows.append(
                    {
                        **_about(condition),
                        "axis": axis,
                        "weight": weight,
                        "n": trial.n,
                        "mean": round(sum(values) / trial.n, 4),
                        "ci95": trial.interval(values, [question for _, question in questions]),
                        "off_axis": round(sum(others) / len(others), 4),
                        **_kept(asked, texts),
                    }
                )
    return rows


def chord_rows(trial: Trial, conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Per condition and axis one row: people with full weights on three axes, drawn at random, ``trial.n`` of them.

    ``followed`` is the share of the replies with the pole asked for, by the oracle's sign and a size of at least 0.2,
    among those of people who have a weight on the axis, with a 95% interval over questions; ``axis`` "all" takes all
    weights of all people together.
    """
    rng = random.Random(f"{trial.seed}:chords")
    asked = [
        (topic, question, {axis: rng.choice((-1.0, 1.0)) for axis in rng.sample(AXES, AT_ONCE)})
        for topic, question in trial.questions("chords")
    ]
    rows = []
    for condition in conditions:
        texts = trial.answers(asked, condition, "chords")
        measures = [measure(text) for text in texts]
        for axis in (*AXES, "all"):
            on = [index for index, (_, _, weights) in enumerate(asked) if axis in (*weights, "all")]
            hits = [
                (float(followed(measures[index][key], int(weight))), asked[index][1])
                for index in on
                for key, weight in asked[index][2].items()
                if axis in (key, "all")
            ]
            if not hits:
                continue
            rows.append(
                {
                    **_about(condition),
                    "axis": axis,
                    "n": len(hits),
                    "followed": round(sum(hit for hit, _ in hits) / len(hits), 4),
                    "ci95": trial.interval(*zip(*hits, strict=True)),
                    **_kept([asked[index] for index in on], [texts[index] for index in on]),
                }
            )
    return rows


def _about(condition: Condition) -> dict[str, Any]:
    return {"method": condition.name, "strength": condition.strength, "temperature": condition.temperature}


def _kept(asked: Sequence[Asked], texts: Sequence[str]) -> dict[str, float]:
    """What steering should leave as it was."""
    relevant = [read_content(text, topic).relevant for text, (topic, _, _) in zip(texts, asked, strict=True)]
    return {
        "relevance": round(sum(relevant) / len(texts), 4),
        "repetition": round(sum(map(repeats, texts)) / len(texts), 4),
    }
