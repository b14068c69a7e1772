"""What a reply says: which facts of which topic, told completely or mixed up. Compared with the topics' own wordings.

A sentence tells a fact when it holds most of the content words of the fact's advice, in any of its three wordings, in
any order; likewise for reasons. Word forms are compared by their first six letters.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

from prefmw.training.topics import Fact, Topic, load_topics

TOLD = 0.7
"""The share of an advice's content words that a sentence must hold to have told it."""

LEXICONS = tomllib.loads((files("prefmw.evaluation") / "lexicons.toml").read_text(encoding="utf-8"))
"""Word lists; see the file."""

FUNCTION_WORDS = frozenset(LEXICONS["function_words"].split())
"""Words that say nothing about a topic."""


@dataclass(frozen=True)
class Content:
    """What a reply says about the topic asked.

    Attributes:
        facts: the topic's facts that it tells, by index, in order.
        reasons: those of them whose own reason it gives.
        wrong: sentences that advise something of another topic, give an advice another fact's reason, or tell people
            not to do what a fact advises.
        extras: examples and caveats of the topic that it holds.
    """

    facts: tuple[int, ...]
    reasons: frozenset[int]
    wrong: int
    extras: int

    @property
    def relevant(self) -> bool:
        """Whether it answers the topic asked: it tells a fact of it, and has no more wrong sentences than facts."""
        return bool(self.facts) and len(self.facts) >= self.wrong

    @property
    def helpfulness(self) -> float:
        """0-100: 25 for each of up to three facts, 15 for their reasons (in proportion), 10 for an example or a caveat,
        less 25 for every wrong sentence; 0 where the topic is not answered.
        """
        if not self.relevant:
            return 0.0
        told = 25 * min(len(self.facts), 3) + 15 * len(self.reasons) / len(self.facts) + 10 * bool(self.extras)
        return float(min(100.0, max(0.0, told - 25 * self.wrong)))


def read_content(text: str, topic: Topic) -> Content:
    """What ``text`` says, as an answer about ``topic``. A reason belongs to the advice of its own sentence, or else
    to the last one before it.
    """
    facts: dict[int, None] = {}
    reasons: set[int] = set()
    wrong = extras = 0
    about: set[int] = set()
    index = _index(topic)
    for sentence in sentences(text):
        words = content_words(sentence)
        advised = {at for at, fact in enumerate(index) if fact.advises(words)}
        denied = {at for at in advised if index[at].is_denied(sentence)}
        explained = {at for at, fact in enumerate(index) if fact.explains(words)}
        told = advised - denied
        facts.update(dict.fromkeys(sorted(told)))
        about = told or about
        reasons |= about & explained
        elsewhere = not advised and not explained and len(words) >= 3 and _other_topic(words, topic)
        wrong += bool(denied or elsewhere or (explained and about and not about & explained))
        extras += any(fact.illustrates(words) for fact in index)
        extras += _share(content_words(topic.caveat), words) >= TOLD
    return Content(tuple(facts), frozenset(reasons), wrong, extras)


def sentences(text: str) -> list[str]:
    """``text`` cut behind its full stops, exclamation and question marks."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def words_of(text: str) -> list[str]:
    """The words of ``text`` in lower case, apostrophes within kept."""
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower())


def content_words(text: str) -> frozenset[str]:
    """Its words without function words, each by its first six letters."""
    return frozenset(word[:6] for word in words_of(text) if word not in FUNCTION_WORDS)


@lru_cache(maxsize=1024)  # every measure asks it of every sentence
def is_joke(sentence: str) -> bool:
    """Whether the sentence is one of the topics' jokes, told in most of its content words."""
    words = content_words(sentence)
    return any(_share(joke, words) >= TOLD and len(words) <= 2 * len(joke) for joke in _near(_jokes(), words))


def repeats(text: str) -> bool:
    """Whether the reply loops: four words in a row come three times, or a sentence of at least four comes twice."""
    words = words_of(text)
    grams = [tuple(words[at : at + 4]) for at in range(len(words) - 3)]
    said = [sentence.lower() for sentence in sentences(text) if len(words_of(sentence)) >= 4]
    return len(set(said)) < len(said) or any(grams.count(gram) >= 3 for gram in set(grams))


@dataclass(frozen=True)
class _Fact:
    acts: tuple[frozenset[str], ...]
    verbs: tuple[str, ...]
    reasons: tuple[frozenset[str], ...]
    example: frozenset[str]

    def advises(self, words: frozenset[str]) -> bool:
        return any(_share(act, words) >= TOLD for act in self.acts)

    def is_denied(self, sentence: str) -> bool:
        """Whether the sentence turns the advice round: "never rinse", "try not to rinse", "avoid rinsing"."""
        return any(
            re.search(rf"\b(not|never|don't|avoid|stop)\s+(to\s+)?{re.escape(verb)}\b", sentence, re.IGNORECASE)
            for verb in self.verbs
        )

    def explains(self, words: frozenset[str]) -> bool:
        return any(_share(reason, words) >= TOLD for reason in self.reasons)

    def illustrates(self, words: frozenset[str]) -> bool:
        return _share(self.example, words) >= TOLD


def _share(wanted: frozenset[str], words: frozenset[str]) -> float:
    return len(wanted & words) / len(wanted) if wanted else 0.0


@cache
def _index(topic: Topic) -> tuple[_Fact, ...]:
    """The topic's facts as sets of words."""

    def graded(*texts: str) -> tuple[frozenset[str], ...]:
        return tuple(content_words(text) for text in texts)

    def entry(fact: Fact) -> _Fact:
        return _Fact(
            graded(fact.act.plain, fact.act.simple, fact.act.expert),
            tuple({text.split()[0] for text in (fact.act.plain, fact.act.simple, fact.act.expert)}),
            graded(fact.reason.plain, fact.reason.simple, fact.reason.expert),
            content_words(fact.example),
        )

    return tuple(map(entry, topic.facts))


@cache
def _acts() -> dict[str, list[tuple[frozenset[str], str]]]:
    """Every advice of every topic, under each of its words."""
    acts: dict[str, list[tuple[frozenset[str], str]]] = {}
    for topic in load_topics():
        for fact in _index(topic):
            for act in fact.acts:
                for word in act:
                    acts.setdefault(word, []).append((act, topic.id))
    return acts


@cache
def _jokes() -> dict[str, list[frozenset[str]]]:
    jokes: dict[str, list[frozenset[str]]] = {}
    for topic in load_topics():
        for fact in topic.facts:
            for word in content_words(fact.joke):
                jokes.setdefault(word, []).append(content_words(fact.joke))
    return jokes


def _near(index: dict[str, list[frozenset[str]]], words: Iterable[str]) -> set[frozenset[str]]:
    return {entry for word in words for entry in index.get(word, ())}


def _other_topic(words: frozenset[str], topic: Topic) -> bool:
    near = {entry for word in words for entry in _acts().get(word, ())}
    return any(_share(act, words) >= TOLD and len(act) >= 3 for act, owner in near if owner != topic.id)
