"""Weights learned from choices: replies are scored, a choice is stored with the scores, and all that a person ever
chose decides their learned weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefmw.decoding import Request, Sampling
from prefmw.errors import UsageError
from prefmw.plans import Defaults, Plan
from prefmw.preferences import (
    Dial,
    Dimensions,
    Feedback,
    FeedbackKind,
    Message,
    PreferenceStore,
    Profile,
    RecordedFeedback,
    Source,
    Stated,
    persona_sentence,
)
from prefmw.preferences.learning import Learned, bradley_terry, information, left_out_accuracy
from prefmw.scoring import Exchange, Progress, Scale, attribute_scores, scored_dimensions, spoken
from prefmw.steering import Backend, build_request, within_context

LEAST = 3
"""Choices below which nothing is learned."""

CANDIDATES = 6
"""Replies that the most instructive pair is chosen from."""

GAIN = 2.0
"""How far candidates are steered, each in a direction of its own."""

SURE = 0.9
"""How certain a weight's sign must be for the weight to be stored."""


@dataclass(frozen=True)
class Choice:
    """A reply that somebody preferred, and the one they did not; a thumb has one of the two, the other is empty.

    ``ended`` says whether they came to their end or were cut off.
    """

    kind: FeedbackKind
    messages: Sequence[Message]
    chosen: str = ""
    rejected: str = ""
    turn_id: int | None = None
    ended: bool = True


@dataclass(frozen=True)
class Lesson:
    """What a person's choices say of their weights: the dimensions (K), the weights (``None`` below :data:`LEAST`
    choices), how many choices they rest on, and the share of those that the others predict.
    """

    dimensions: tuple[str, ...]
    learned: Learned | None
    choices: int
    accuracy: float | None
    stored: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As ``prefs learn --json`` prints it."""
        weights = {}
        if self.learned is not None:
            for index, key in enumerate(self.dimensions):
                weights[key] = {
                    "value": round(float(self.learned.weights[index]), 4),
                    "interval": [round(float(end[index]), 4) for end in (self.learned.low, self.learned.high)],
                    "confidence": round(float(self.learned.confidence[index]), 4),
                    "stored": key in self.stored,
                }
        return {"choices": self.choices, "left_out_accuracy": self.accuracy, "weights": weights}


def score_choices(
    user_id: str,
    choices: Sequence[Choice],
    backend: Backend,
    dimensions: Dimensions,
    scale: Scale,
    progress: Progress = lambda share: None,
) -> list[Feedback]:
    """Feedback with both replies' scores in the model's deviations; a reply that is missing counts as an average one.

    Raises:
        UsageError: a choice without any reply, or a scale of other dimensions.
        ContextLengthError: a conversation fills the model's context.
    """
    _check_scale(scale, dimensions)
    if any(not choice.chosen and not choice.rejected for choice in choices):
        raise UsageError("a choice names a reply at least")
    exchanges = [
        Exchange(choice.messages, text, choice.ended)
        for choice in choices
        for text in (choice.chosen, choice.rejected)
        if text
    ]
    scores = iter(scale.standardise(attribute_scores(exchanges, backend, dimensions, progress)))
    found = []
    for choice in choices:
        pair = [next(scores) if text else np.zeros(len(scale.dimensions)) for text in (choice.chosen, choice.rejected)]
        by_dimension = {
            key: (float(pair[0][index]), float(pair[1][index])) for index, key in enumerate(scale.dimensions)
        }
        prompt = choice.messages[-1].content
        found.append(
            Feedback(user_id, choice.kind, prompt, choice.chosen, choice.rejected, by_dimension, choice.turn_id)
        )
    return found


def learn_from_choices(
    store: PreferenceStore, user_id: str, dimensions: Sequence[str], *, actor: str, reason: str
) -> Lesson:
    """Learn a person's weights anew from everything they chose, and store those whose sign is sure as learned layers.

    A weight that choices had set and are no longer sure of is removed. What was heard in the person's own words stays:
    words say more than choices.

    Raises:
        ConflictError: the profile changed meanwhile.
    """
    profile = store.profile(user_id)
    x = differences(store.feedback(user_id), dimensions)
    if len(x) < LEAST:
        return Lesson(tuple(dimensions), None, len(x), None, ())
    learned = bradley_terry(x)
    before = profile.layer(Source.learned)
    from_choices = {
        key for key, layer in before.items() if isinstance(layer.evidence, dict) and "choices" in layer.evidence
    }
    sure = {
        key: Stated(
            round(float(learned.weights[index]), 4),
            round(float(learned.confidence[index]), 4),
            {"choices": len(x), "interval": [round(float(end[index]), 4) for end in (learned.low, learned.high)]},
        )
        for index, key in enumerate(dimensions)
        if learned.confidence[index] >= SURE and (key not in before or key in from_choices)
    }
    unsure = {key: None for key in from_choices if key in dimensions and key not in sure}
    if sure or unsure:
        store.write_weights(
            user_id,
            {**sure, **unsure},
            source=Source.learned,
            actor=actor,
            reason=reason,
            expected_revision=profile.revision,
        )
    return Lesson(tuple(dimensions), learned, len(x), round(left_out_accuracy(x), 4), tuple(sure))


def instructive_pair(
    messages: Sequence[Message],
    profile: Profile,
    known: Learned,
    backend: Backend,
    dimensions: Dimensions,
    scale: Scale,
    sampling: Sampling,
    *,
    candidates: int = CANDIDATES,
) -> tuple[str, str]:
    """Two replies whose comparison would teach most of a person's weights, of several that were steered at random.

    Args:
        messages: a conversation with a user's message last.
        profile: whose persona every candidate is told; the weights are not applied, they are what is asked about.
        known: what is known of the weights so far, (K,).
        sampling: its seed draws the steering as well.

    Raises:
        UsageError: the model gave fewer than two different replies.
    """
    _check_scale(scale, dimensions)
    rng = np.random.default_rng(sampling.seed)
    requests = leaning(messages, profile, backend, dimensions, scale.dimensions, sampling, candidates, rng)
    found = {text.strip(): ended for text, ended in spoken(requests, backend) if text.strip()}
    replies = list(found)
    if len(replies) < 2:
        raise UsageError("the model has only one answer to this; ask something else")
    exchanges = [Exchange(messages, reply, ended) for reply, ended in found.items()]
    scores = scale.standardise(attribute_scores(exchanges, backend, dimensions))
    pairs = list(combinations(range(len(replies)), 2))
    taught = information([scores[one] - scores[other] for one, other in pairs], known)
    one, other = pairs[int(taught.argmax())]
    return (replies[one], replies[other]) if rng.random() < 0.5 else (replies[other], replies[one])


def leaning(
    messages: Sequence[Message],
    profile: Profile,
    backend: Backend,
    dimensions: Dimensions,
    keys: Sequence[str],
    sampling: Sampling,
    count: int,
    rng: np.random.Generator | None = None,
) -> list[Request]:
    """Requests for ``count`` replies that lean somewhere at random, each along as many of ``keys`` as act at once, each
    with a seed of its own.
    """
    rng = rng or np.random.default_rng(sampling.seed)
    requests = []
    for index in range(count):
        weights = rng.normal(size=len(keys))
        weights /= np.linalg.norm(weights)
        strongest = sorted(range(len(keys)), key=lambda at: -abs(weights[at]))[: Defaults.max_dials]
        poles = [dimensions[keys[at]].pole(float(weights[at])) for at in strongest]
        dials = tuple(
            Dial(keys[at], float(weights[at]), pole.principle, pole.midpoint)
            for at, pole in zip(strongest, poles, strict=True)
        )
        seeded = replace(sampling, seed=sampling.seed + index)
        plan = Plan("drift", GAIN, persona_sentence(profile), profile.revision, profile.weights, seeded, dials)
        requests.append(within_context(build_request(plan, messages, backend.chat), backend.chat))
    return requests


def differences(feedback: Sequence[RecordedFeedback], dimensions: Sequence[str]) -> NDArray[np.float64]:
    """What was chosen less what was not, (N, K), of the feedback that was scored on any of ``dimensions``; 0 on those
    that it was not scored on, which says nothing of them. Of several thumbs for one reply the latest counts.
    """
    latest = {one.turn_id: one for one in feedback if _is_thumb(one)}
    rows = [
        [chosen - rejected for chosen, rejected in (one.scores.get(key, (0.0, 0.0)) for key in dimensions)]
        for one in feedback
        if any(key in one.scores for key in dimensions) and (not _is_thumb(one) or latest[one.turn_id] is one)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(dimensions))


def _is_thumb(one: RecordedFeedback) -> bool:
    """Whether it is a thumb for a stored reply, of which there may be several."""
    return one.kind in ("like", "dislike") and one.turn_id is not None


def _check_scale(scale: Scale, dimensions: Dimensions) -> None:
    if scale.dimensions != scored_dimensions(dimensions):
        raise UsageError("these scores' scale was measured on other dimensions; calibrate anew")
