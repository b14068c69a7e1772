"""Preference pairs out of the embedded model's corpus: two answers to one question, one of them better by a preference.

Both answers come from the composer, each asked for a style of its own and following it as often as its corpus does;
which is better is told by the values drawn for their points, so that no label is by chance. The wordings, the
combinations of poles and the markers are the split's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prefmw.preferences import Message
from prefmw.preferences.principle import PERSONA_SENTENCE
from prefmw.training.composer import Answer, Composer, Style
from prefmw.training.pairs import Pair
from prefmw.training.styles import AXES, Split
from prefmw.training.topics import Topic

CLEARLY = 0.5
"""By how much of a pole the better answer is the better one, at least."""

UNASKED_COSTS = 0.5
"""What a pole that nobody asked for costs, in poles that somebody did."""


def composed_pairs(split: Split, count: int, *, seed: int, unseen: float = 0.0) -> Iterator[Pair]:
    """That many pairs; the same seed gives the same ones. At least the share ``unseen`` of a held-out split's ask for
    what training never does, a combination of poles or a pole of a topic; ``group`` says which do.
    """
    maker = _Maker(split, seed)
    made = 0
    while made < count:
        pair = maker.pair(must_be_unseen=split != "train" and made < unseen * count)
        if pair is not None:
            made += 1
            yield pair


class _Maker:
    def __init__(self, split: Split, seed: int) -> None:
        self.composer = Composer(split, seed=seed)
        self.random = self.composer.random

    def pair(self, *, must_be_unseen: bool) -> Pair | None:
        """One pair; ``None`` where the answers came out too alike."""
        composer, rng = self.composer, self.random
        topic = rng.choice(composer.topics)
        style = composer.draw_style(topic)
        seen = composer._is_seen(style, topic)
        if not style or (must_be_unseen and seen):
            return None
        preference = self._preference(style)
        messages: list[Message] = []
        if rng.random() < 0.3:
            messages.append(Message("system", composer.plain_system_prompt()))
        messages.append(Message("user", composer._typed(composer.question(topic))))
        told: list[int] = []
        if rng.random() < 0.25:
            before = style if rng.random() < 0.7 else {}
            messages.append(Message("assistant", composer.answer(topic, before, told).text))
            messages.append(Message("user", rng.choice(composer._talk.small["asking"]["more"][composer.split])))
        return self._judged(topic, style, messages, told, preference, "seen" if seen else "unseen")

    def _judged(
        self, topic: Topic, style: Style, messages: list[Message], told: list[int], preference: str, group: str
    ) -> Pair | None:
        rng = self.random
        other, state = self._other(style), rng.getstate()
        answers = []
        for asked in (style, other):
            rng.setstate(state)  # so that both tell the same facts as far as they go
            answers.append(self.composer.answer(topic, asked, list(told)))
        merits = [_merit(answer, style) for answer in answers]
        better = merits[1] > merits[0]
        if abs(merits[0] - merits[1]) < CLEARLY or answers[0].text == answers[1].text:
            return None
        return Pair(tuple(messages), answers[better].text, answers[not better].text, preference, group)

    def _preference(self, style: Style) -> str:
        """The preference in words, as :func:`prefmw.preferences.principle_text` puts a profile's."""
        composer, rng = self.composer, self.random
        if rng.random() < 0.3:
            return composer.principles(style)
        axis = rng.choice(list(style))
        others = {other: sign for other, sign in style.items() if other != axis}
        persona = PERSONA_SENTENCE.format(persona=composer.persona(axis, style[axis]))
        return " ".join(filter(None, [persona, composer.principles(others)]))

    def _other(self, style: Style) -> dict[str, int]:
        """What the other answer is asked for: the opposite, nothing, all but one, or one thing more."""
        rng, form = self.random, self.random.random()
        one = rng.choice(list(style))
        further = rng.choice([axis for axis in AXES if axis not in style] or [one])
        if form < 0.3:
            return {axis: -sign for axis, sign in style.items()}
        if form < 0.55:
            return {}
        if form < 0.7:
            return {axis: sign for axis, sign in style.items() if axis != one}
        if form < 0.85:
            return {**style, one: -style[one]}
        return {**style, further: rng.choice((-1, 1))}


def _merit(answer: Answer, style: Style) -> float:
    """How far an answer has the poles asked for, less what it has of others; in poles."""
    drawn: Mapping[str, float] = answer.drawn
    wanted = sum(drawn[axis] * sign for axis, sign in style.items())
    return wanted - UNASKED_COSTS * sum(abs(drawn[axis]) for axis in AXES if axis not in style)
