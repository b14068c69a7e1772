"""Scored replies out of the embedded model's corpus: questions with better and worse answers, which the oracles score.

Helpfulness is what a reply is worth to a reader who has not all day, verbosity its length
(:mod:`prefmw.evaluation.oracles`), both from 0 to 100. So they go together as far as an answer needs words, and pull
apart beyond. Answers are the composer's, asked for any length and style, and among them such as a small model gives:
about another topic, with sentences of another, cut short, with repetitions.
"""

from __future__ import annotations

from collections.abc import Iterator

from prefmw.evaluation.content import read_content, sentences
from prefmw.evaluation.oracles import verbosity
from prefmw.preferences import Message
from prefmw.training.composer import Composer
from prefmw.training.scored import Scored
from prefmw.training.styles import Split
from prefmw.training.topics import Topic

ATTRIBUTES = ("helpfulness", "verbosity")
"""What the oracles score."""

PATIENCE = 40
"""Words that a reader does not mind reading; about the median length of a neutral answer of the corpus."""


def oracle_scores(text: str, topic: Topic) -> dict[str, float]:
    """Both scores of a reply about a topic, 0-100."""
    return {"helpfulness": helpfulness(text, topic), "verbosity": 50 + 50 * verbosity(text)}


def helpfulness(text: str, topic: Topic) -> float:
    """What is told, less the reading of it, 0-100; 0 where the topic is not answered.

    Every fact of the topic counts half as much as the one before it, 70 for all there could be; up to two sevenths of
    that come on top for the facts' reasons, in proportion, and 10 for an example or a caveat. A wrong sentence takes
    25, and n words more than :data:`PATIENCE` take n² / 160. (``helpful`` of ``eval steer`` is what is told.)
    """
    content = read_content(text, topic)
    if not content.relevant:
        return 0.0
    told = 70 * (1 - 0.5 ** len(content.facts)) * (1 + 2 / 7 * len(content.reasons) / len(content.facts))
    reading = max(0, len(text.split()) - PATIENCE) ** 2 / 160
    return min(100.0, max(0.0, told + 10 * bool(content.extras) - 25 * content.wrong - reading))


def composed_scores(split: Split, count: int, *, seed: int, answers: int = 1, spoilt: float = 0.3) -> Iterator[Scored]:
    """``count`` replies, ``answers`` a question, a share of them ``spoilt``; the same seed gives the same ones."""
    maker = _Maker(split, seed)
    made = 0
    while made < count:
        topic, question = maker.question()
        for _ in range(min(answers, count - made)):
            text = maker.answer(topic, spoilt)
            yield Scored((Message("user", question),), text, oracle_scores(text, topic))
            made += 1


class _Maker:
    def __init__(self, split: Split, seed: int) -> None:
        self.composer = Composer(split, seed=seed)
        self.random = self.composer.random

    def question(self) -> tuple[Topic, str]:
        topic = self.random.choice(self.composer.topics)
        return topic, self.composer._typed(self.composer.question(topic))

    def answer(self, topic: Topic, spoilt: float) -> str:
        rng = self.random
        text = self._plain(topic)
        if rng.random() >= spoilt:
            return text
        other = rng.choice([one for one in self.composer.topics if one is not topic])
        said, foreign = sentences(text), sentences(self._plain(other))
        kind = rng.random()
        if kind < 0.25:
            return " ".join(foreign)
        if kind < 0.65:  # some of another topic's in between
            for sentence in foreign[: rng.choice((1, 1, 2, 3))]:
                said.insert(rng.randint(0, len(said)), sentence)
        elif kind < 0.85:  # cut short
            words = text.split()
            said = [" ".join(words[: rng.randint(1, len(words))])]
        else:  # repeating itself
            said += rng.choices(said, k=rng.choice((1, 2, 4)))
        return " ".join(said)

    def _plain(self, topic: Topic) -> str:
        """The composer's, of any length, in a style in two cases of five."""
        composer, rng = self.composer, self.random
        style = composer.draw_style(topic) if rng.random() < 0.4 else {}
        if rng.random() < 0.7:
            style = {**style, "verbosity": rng.choice((-1, 0, 1))}
        return composer.answer(topic, style, points=rng.choice((None, None, 1, 2, 3, 4, 5))).text
