"""Does a model obey directions, and at what price? DPA's front on held-out questions, the paper's figure 4.

Every policy answers the same questions with the same seeds, under directions in equal steps across its cone. Beside
DPA's checkpoints stand the chat model as it is, preference prompting for either pole of verbosity, and SteerLM-style
checkpoints under the rewards that go together in their data. Replies are scored by the oracles and, where there is one,
by the reward model that the checkpoints were trained against.

A front's worth is its hypervolume: the share of the square from the reference point to the best point that is
dominated by one of its points. There are two, since half of the directions want less of the second attribute: of
(helpfulness, brevity) and of (helpfulness, length), each from 0 to 100 with the reference point (0, 0); brevity is 100
less verbosity.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefmw.arithmetic import Arithmetic
from prefmw.decoding import Request, Sampling
from prefmw.decoding.many import decode_all
from prefmw.evaluation.content import read_content, repeats, words_of
from prefmw.evaluation.held_out import profile_of
from prefmw.evaluation.runs import Run
from prefmw.evaluation.statistics import RESAMPLES, cluster_interval
from prefmw.evaluation.steer import MAX_TOKENS, TOP_P
from prefmw.plans import make_plan
from prefmw.preferences import Dimensions, Direction, Message
from prefmw.preferences.directions import DPACard, Vector, angles_of, from_angles, project, spread_directions
from prefmw.rewards import Scorer
from prefmw.steering import Backend, build_request
from prefmw.training.composed_scores import ATTRIBUTES, oracle_scores
from prefmw.training.styles import Split
from prefmw.training.topics import Topic, load_topics

Values = NDArray[np.float64]

FRONTS = {"brief": (1.0, -1.0), "long": (1.0, 1.0)}
"""The two hypervolumes, by the sign of verbosity in them."""


PLAIN = (("plain", None), ("prompt", -1.0), ("prompt", 1.0))
"""What stands beside the checkpoints: the chat model as it is, and prompted for either pole of verbosity."""


@dataclass(frozen=True)
class Question:
    """A held-out question and its topic."""

    topic: Topic
    text: str

    @property
    def messages(self) -> list[Message]:
        """As a conversation."""
        return [Message("user", self.text)]


@dataclass(frozen=True)
class Point:
    """A policy's replies under one direction, or one condition of another kind.

    Attributes:
        policy: whose they are.
        label: what was asked for.
        direction: of DPA's; ``None`` for others.
        texts: the replies, one a question.
        oracles: (n, 2), helpfulness and verbosity, 0-100.
        rewards: (n, 2), the reward model's; empty without one.
    """

    policy: str
    label: str
    direction: Vector | None
    texts: list[str]
    oracles: Values
    rewards: Values = field(default_factory=lambda: np.zeros((0, 2)))


@dataclass(frozen=True)
class Trial:
    """What is asked of whom; ``progress`` is told of every reply, ``run`` keeps them by what was asked for."""

    questions: list[Question]
    backend: Backend
    dimensions: Dimensions
    scorer: Scorer | None
    run: Run = field(default_factory=lambda: Run("control", {}))
    seed: int = 0
    temperature: float = 0.7
    progress: Callable[[int], None] = lambda count: None

    def point(
        self,
        policy: str,
        label: str,
        direction: Vector | None,
        request: Callable[[Question, Sampling], Request],
        chat: Backend | Arithmetic,
        prompt: str = "",
    ) -> Point:
        """The replies to all questions under one request each; ``label`` and ``prompt`` tell them from others."""

        def draw() -> list[str]:
            asked = [request(question, self.sampling(self.seed + at)) for at, question in enumerate(self.questions)]
            texts = []
            for ids, _ in decode_all(asked, chat.engine):
                texts.append(chat.chat.tokenizer.decode(ids, skip_special_tokens=True))
                self.progress(1)
            return texts

        return self.scored(policy, label, direction, self.kept(f"{policy} {label} {prompt}", len(self.questions), draw))

    def kept(self, name: str, replies: int, draw: Callable[[], Any]) -> Any:
        """What ``draw`` draws, or what a run that goes on has of it: so many replies, which are told as well."""
        if name in self.run:
            self.progress(replies)
        return self.run.unit(name, draw)

    def scored(self, policy: str, label: str, direction: Vector | None, texts: list[str]) -> Point:
        """A point of finished replies."""
        scores = [oracle_scores(text, question.topic) for text, question in zip(texts, self.questions, strict=True)]
        oracles = np.array([[row[name] for name in ATTRIBUTES] for row in scores])
        if self.scorer is None:
            return Point(policy, label, direction, texts, oracles)
        said = [(question.messages, text) for question, text in zip(self.questions, texts, strict=True)]
        return Point(policy, label, direction, texts, oracles, self.scorer.rewards(said, ATTRIBUTES).double().numpy())

    def sampling(self, seed: int) -> Sampling:
        """How a reply is drawn."""
        return Sampling(self.temperature, TOP_P, None, MAX_TOKENS, seed)


def held_out_questions(split: Split, n: int, seed: int) -> list[Question]:
    """``n`` questions in wordings that no training holds; the same for the same seed."""
    rng, found = random.Random(f"{split}:{seed}:control"), []
    for _ in range(n):
        topic = rng.choice(load_topics())
        found.append(Question(topic, rng.choice(topic.held_out(split))))
    return found


def plain_points(trial: Trial) -> list[Point]:
    """The chat model as it is, and prompted for either pole of verbosity."""
    points = []
    for policy, weight in PLAIN:
        profile = profile_of({} if weight is None else {"verbosity": weight})

        def request(question: Question, sampling: Sampling, profile: Any = profile) -> Request:
            method = "prompt" if profile.layers else "none"
            plan = make_plan(profile, trial.dimensions, method, None, sampling)
            return build_request(plan, question.messages, trial.backend.chat)

        label = "" if weight is None else f"verbosity {weight:+g}"
        points.append(trial.point(policy, label, None, request, trial.backend))
    return points


def asked_of(card: DPACard, directions: int, angles: Sequence[float] = ()) -> list[tuple[str, Vector | None, str]]:
    """What a checkpoint is asked for, a point each: its label, its direction if it is one, and its system prompt."""
    if card.condition == "rewards":
        return [
            (", ".join(f"{value:.0f}" for value in target), None, card.reward_prompt(target)) for target in card.targets
        ]
    spread = [from_angles([one]) for one in angles] or spread_directions(card, directions)
    return [(f"{round(angles_of(one)[0], 1):+g}°", one, card.prompt(one)) for one in spread]


def policy_points(
    trial: Trial, name: str, policy: Arithmetic, directions: int, angles: Sequence[float] = ()
) -> list[Point]:
    """A checkpoint's replies: under so many directions across its cone, or those of ``angles`` where there are any; of
    a SteerLM-style one under its targets.
    """
    found = []
    for label, direction, prompt in asked_of(policy.card, directions, angles):

        def request(question: Question, sampling: Sampling, prompt: str = prompt) -> Request:
            return policy.request(question.messages, prompt, sampling)

        found.append(trial.point(name, label, direction, request, policy, prompt))
    return found


def robust_rows(
    trial: Trial, name: str, policy: Arithmetic, vectors: Sequence[Vector], count: int
) -> list[dict[str, Any]]:
    """For each direction one reply, the best of ``count`` at it, and the best of as many around it: the mean of v . r,
    v unprojected, by the oracles, with a 95% interval over questions, and the paired difference of the last two.
    """
    rows = []
    for vector in vectors:
        applied = project(vector, policy.card)
        direction = Direction(policy.card.attributes, vector, applied, policy.card.prompt(applied))

        def draw(vector: Vector = vector, direction: Direction = direction) -> dict[str, list[str]]:
            return _robust_replies(trial, policy, vector, direction, count)

        asked = 2 * count * len(trial.questions)
        chosen: dict[str, list[str]] = trial.kept(f"{name} {vector} {count}", asked, draw)
        values = {}
        for how, texts in chosen.items():
            point = trial.scored(name, how, vector, texts)
            values[how] = np.array([policy.card.value(vector, row) for row in point.oracles.tolist()])
            rows.append(
                {
                    "policy": name,
                    "how": how,
                    "angle": round(angles_of(vector)[0], 2),
                    "n": len(texts),
                    "value": round(float(values[how].mean()), 3),
                    "ci95": _interval(trial, values[how]),
                    "helpfulness": round(float(point.oracles[:, 0].mean()), 3),
                    "verbosity": round(float(point.oracles[:, 1].mean()), 3),
                }
            )
        gains = values[f"robust {count}"] - values[f"best of {count}"]
        rows[-1]["over_best_of"] = {"mean": round(float(gains.mean()), 3), "ci95": _interval(trial, gains)}
    return rows


def _robust_replies(
    trial: Trial, policy: Arithmetic, vector: Vector, direction: Direction, count: int
) -> dict[str, list[str]]:
    """The reply to every question that each way of choosing comes to."""
    chosen: dict[str, list[str]] = {"one": [], f"best of {count}": [], f"robust {count}": []}
    requests: list[Request] = []
    for index, question in enumerate(trial.questions):
        seeds = [trial.seed + index * count + copy for copy in range(count)]
        requests += [policy.request(question.messages, direction.prompt, trial.sampling(one)) for one in seeds]
        requests += policy.around(question.messages, direction, trial.sampling(seeds[0]), count)
    said = []
    for ids, ended in decode_all(requests, policy.engine):
        said.append((ids, ended))
        trial.progress(1)
    for index, question in enumerate(trial.questions):
        at = index * 2 * count
        lots = {"one": said[at : at + 1], f"best of {count}": said[at : at + count]}
        lots[f"robust {count}"] = said[at + count : at + 2 * count]
        for how, lot in lots.items():
            ids, _ = lot[policy.best(question.messages, vector, lot)]
            chosen[how].append(policy.chat.tokenizer.decode(ids, skip_special_tokens=True))
    return chosen


def point_rows(trial: Trial, points: Sequence[Point]) -> list[dict[str, Any]]:
    """A row a point: means with 95% intervals over questions."""
    rows = []
    for point in points:
        row: dict[str, Any] = {
            "policy": point.policy,
            "asked": point.label,
            "angle": None if point.direction is None else round(angles_of(point.direction)[0], 2),
            "direction": None if point.direction is None else [round(value, 4) for value in point.direction],
            "n": len(point.texts),
        }
        for place, name in enumerate(ATTRIBUTES):
            row[name] = round(float(point.oracles[:, place].mean()), 3)
            row[f"{name}_ci95"] = _interval(trial, point.oracles[:, place])
        row["reward"] = (
            {name: round(float(point.rewards[:, place].mean()), 3) for place, name in enumerate(ATTRIBUTES)}
            if len(point.rewards)
            else None
        )
        row["words"] = round(sum(len(words_of(text)) for text in point.texts) / len(point.texts), 2)
        relevant = [
            read_content(text, question.topic).relevant
            for text, question in zip(point.texts, trial.questions, strict=True)
        ]
        row["relevance"] = round(sum(relevant) / len(relevant), 4)
        row["repetition"] = round(sum(map(repeats, point.texts)) / len(point.texts), 4)
        rows.append(row)
    return rows


def front_rows(trial: Trial, points: Sequence[Point]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row a policy: how verbosity goes with the angle, and both hypervolumes with 95% intervals over questions. And a
    row a pair: how much those of one are above the other's, the same questions drawn for both.
    """
    names = list(dict.fromkeys(point.policy for point in points))
    weights = _resampled(trial)  # (resamples, n)
    volumes: dict[str, dict[str, Values]] = {}
    rows = []
    for name in names:
        ours = [point for point in points if point.policy == name]
        scores = np.stack([point.oracles for point in ours])  # (P, n, 2)
        drawn = np.einsum("bn,pnk->bpk", weights, scores)
        volumes[name] = {
            front: np.array([_share(means, sign[1]) for means in (scores.mean(1), *drawn)])
            for front, sign in FRONTS.items()
        }
        row: dict[str, Any] = {"policy": name, "points": len(ours), "n": len(trial.questions)}
        angles = [angles_of(point.direction)[0] for point in ours if point.direction is not None]
        verbosity = scores[:, :, 1].mean(1)
        row["spearman"] = _spearman(angles, verbosity.tolist()) if len(angles) > 2 else None
        row["falls"] = int((np.diff(verbosity) < 0).sum()) if len(angles) > 1 else None
        for front in FRONTS:
            low, high = np.percentile(volumes[name][front][1:], [2.5, 97.5])
            row[front] = round(float(volumes[name][front][0]), 4)
            row[f"{front}_ci95"] = [round(float(low), 4), round(float(high), 4)]
        rows.append(row)
    over = [
        {
            "policy": one,
            "other": other,
            **{front: _difference(volumes[one][front], volumes[other][front]) for front in FRONTS},
        }
        for one in names
        for other in names
        if other != one
    ]
    return rows, over


def hypervolume(points: Values) -> float:
    """The area that is dominated by one of the points (P, 2), both coordinates the better the greater, from (0, 0)."""
    area, reached = 0.0, 0.0
    for first, second in sorted(np.maximum(points, 0).tolist(), reverse=True):
        area += first * max(0.0, second - reached)
        reached = max(reached, second)
    return area


def _share(means: Values, sign: float) -> float:
    """A front's hypervolume as a share of the whole square, of mean scores (P, 2) from 0 to 100."""
    second = means[:, 1] if sign > 0 else 100 - means[:, 1]
    return hypervolume(np.stack([means[:, 0], second], axis=1)) / 1e4


def _resampled(trial: Trial) -> Values:
    """How much each question counts in each of the bootstrap's draws of questions, (resamples, n); wordings that come
    more than once are drawn together.
    """
    texts = [question.text for question in trial.questions]
    names = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    owner = np.array([names[text] for text in texts])
    drawn = np.random.default_rng(trial.seed).integers(len(names), size=(RESAMPLES, len(names)))
    counts = np.stack([np.bincount(row, minlength=len(names)) for row in drawn])[:, owner].astype(float)
    return np.asarray(counts / counts.sum(1, keepdims=True))


def _difference(ours: Values, theirs: Values) -> dict[str, Any]:
    gains = ours - theirs
    low, high = np.percentile(gains[1:], [2.5, 97.5])
    return {"mean": round(float(gains[0]), 4), "ci95": [round(float(low), 4), round(float(high), 4)]}


def _interval(trial: Trial, values: Values) -> list[float]:
    low, high = cluster_interval(values.tolist(), [question.text for question in trial.questions], seed=trial.seed)
    return [round(low, 3), round(high, 3)]


def _spearman(ones: Sequence[float], others: Sequence[float]) -> float:
    """The correlation of ranks; ties have their mean rank."""

    def ranks(values: Sequence[float]) -> Values:
        found = np.array([[float(value > other) + 0.5 * float(value == other) for other in values] for value in values])
        return np.asarray(found.sum(1))

    return round(float(np.corrcoef(ranks(ones), ranks(others))[0, 1]), 4)
