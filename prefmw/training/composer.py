"""The corpus of the embedded chat model: topics, styles and ways of asking composed into chats, from a seed.

A chat asks for some poles of the five style axes, or for none, in one of many wordings. An answer is a row of points,
each one fact. For every point every axis is drawn afresh: the pole asked for with the probability ``follow_rate``,
otherwise (and wherever nothing is asked) mostly neutral, now and then a pole nobody asked for. So a request raises the
probability of a style rather than deciding it, as in a real model, and every point of an answer shows it again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from prefmw.preferences import Message, default_dimensions
from prefmw.preferences.principle import PERSONA_SENTENCE
from prefmw.training.styles import AXES, Split, Styles, Talk, Wordings, load_styles, load_talk, pole_name
from prefmw.training.topics import Fact, Topic, load_topics

FOLLOW_RATE = 0.8
"""How often a point has the style asked for; fixed before anything was measured."""

UNASKED = 0.025
"""The probability of either pole where it was not asked for."""

T = TypeVar("T")

Style = Mapping[str, int]
"""A pole by axis, -1 or +1; an axis left out was not asked for."""

_TURNS_ROUND = re.compile(
    r"n't|^(no|not|never|nobody|nothing|none|nor|without|less|few|fewer|little|least|hardly|rather|instead|than|too|only|but"
    r"|skip|avoid|leave|drop|spare|stop|cut|hates?|dislikes?|skips?|avoids?|tired|sick|allergic|bored)\b",
    re.IGNORECASE,
)
"""Words without which a request may ask for the opposite."""

_FUNCTION_WORDS = frozenset(
    "a about all am an and any are as at be been before but by can could did do does doing for from get go got "
    "had has have help how i i'd i'm i've if in into is it it's its just keep know like make may me more most "
    "much my need not of on one or our out over should so some than that the their them then there these they "
    "things this to too up use want was way ways we what what's when where which while who why will with without "
    "would you your".split()
)
"""Words that a search would do without."""

_LEVELS = {-1: "simple", 0: "plain", 1: "expert"}
_FRAMES = {-1: "casual", 0: "neutral", 1: "formal"}


@dataclass(frozen=True)
class Answer:
    """An assistant's turn with its labels: the topic (none for small talk and refusals), the style asked for at that
    time, and the mean of the values drawn for its points, by axis.
    """

    text: str
    topic: str | None
    asked: Style
    drawn: Mapping[str, float]


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with an answer; ``answers`` are its assistant's turns, in order. ``sources`` are, for
    every message, the questions, wordings and pole sentences in it, whole where the message lost some of their words;
    an answer has none.
    """

    messages: tuple[Message, ...]
    answers: tuple[Answer, ...]
    sources: tuple[tuple[str, ...], ...]


@dataclass
class _State:
    """One conversation in the making: what was asked, about what, which facts have been told, how many of them an
    answer may tell, and what has been said.
    """

    points: int | None = None
    asked: dict[str, int] = field(default_factory=dict)
    topic: Topic | None = None
    told: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    sources: list[tuple[str, ...]] = field(default_factory=list)

    def chat(self) -> Chat:
        return Chat(tuple(self.messages), tuple(self.answers), tuple(self.sources))


class Composer:
    """Composes chats of one split.

    Args:
        split: ``train`` uses nothing held out; ``dev`` and ``test`` ask in their own wordings, of any combination,
            and may answer with their own markers as well.
        seed: the same seed gives the same chats.
        follow_rate: how often a point has the style asked for, in [0, 1].
    """

    def __init__(self, split: Split = "train", *, seed: int, follow_rate: float = FOLLOW_RATE) -> None:
        self.split = split
        self.random = random.Random(f"{split}:{seed}")
        self._follow_rate = follow_rate
        self._drawn: list[str] = []  # what the message in the making is made from
        self.topics = load_topics()
        self._styles: Styles = load_styles()
        self._talk: Talk = load_talk()
        self._principles = {
            pole_name(axis, sign): default_dimensions()[axis].pole(sign).principle for axis in AXES for sign in (-1, 1)
        }

    def chats(self, count: int, *, short: bool = False) -> Iterator[Chat]:
        """That many chats: most about the topics, many about the style asked for, the rest small talk and questions
        beyond the topics. ``short`` ones have one turn and an answer of one or two points, or name a question's topic
        alone: more questions and more wordings in as many tokens, to begin with.
        """
        kinds = (self.chat, self.style_chat, self.small_chat, self.topic_chat)
        shares = (0.4, 0.22, 0.13, 0.25) if short else (0.55, 0.27, 0.13, 0.05)
        for _ in range(count):
            yield self.random.choices(kinds, shares)[0](short=short)

    def chat(self, *, short: bool = False) -> Chat:
        """One chat about one or more topics, of one to three turns, now and then many."""
        rng = self.random
        state = _State(points=rng.choice((1, 2)) if short else None)
        shares = (0.68, 0.32, 0, 0) if short else (0.55, 0.27, 0.14, 0.04)
        turns = rng.choices((1, 2, 3, rng.randint(4, 12)), shares)[0]
        state.topic = rng.choice(self.topics)
        style = self.draw_style(state.topic)
        in_system = bool(style) and rng.random() < 0.75
        if in_system:
            self._says(state, "system", self.system_prompt(style))
        elif rng.random() < 0.45:
            self._says(state, "system", self.plain_system_prompt())
        state.asked.update(style)
        for turn in range(turns):
            question = self._turn(state, first=turn == 0)
            if turn == 0 and style and not in_system:
                request = self.plain_request(style)
                question = f"{request} {question}" if rng.random() < 0.5 else f"{question} {request}"
            elif turn > 0 and rng.random() < 0.12:
                question = f"{question} {self._changed_mind(state)}"
            self._exchange(state, question, self._reply(state))
        return state.chat()

    def small_chat(self, *, short: bool = False) -> Chat:
        """Small talk, or a question beyond the topics, alone or followed by one within them."""
        rng, state = self.random, _State(points=1 if short else None)
        if rng.random() < 0.5:
            state.asked.update(self.draw_style(None))
            if state.asked:
                self._says(state, "system", self.system_prompt(state.asked))
        for turn in range(1 if short else rng.choices((1, 2, 3), (0.6, 0.3, 0.1))[0]):
            if turn and rng.random() < 0.5:
                state.topic, state.told = rng.choice(self._allowed_topics(state.asked)), []
                question, answer = self._turn(state, first=True), self._reply(state)
            else:
                question, text = self.unknown() if rng.random() < 0.65 else self._small_talk()
                answer = Answer(text, None, dict(state.asked), {})
            self._exchange(state, question, answer)
        return state.chat()

    def style_chat(self, *, short: bool = False) -> Chat:
        """Asked how it will answer, the model says which poles it was asked for; now and then it then answers so."""
        rng, state = self.random, _State(points=1 if short else None)
        state.topic = rng.choice(self.topics)
        while not state.asked:
            state.asked.update(self.draw_style(state.topic))
        about = self._one(("own", "likes"))
        asking = self._one(self._talk.small["style"][about])
        if rng.random() < 0.08:
            state.asked.clear()
        elif rng.random() < 0.75:
            self._says(state, "system", self.system_prompt(state.asked))
        else:
            asking = f"{self.plain_request(state.asked)} {asking}"
        answer = Answer(self.described_style(state.asked, about), None, dict(state.asked), {})
        self._exchange(state, asking, answer)
        if rng.random() < 0.2:
            self._exchange(state, self._turn(state, first=True), self._reply(state))
        return state.chat()

    def topic_chat(self, *, short: bool = False) -> Chat:
        """Asked what a question is about, the model names the topic, or says that it is none of its own."""
        rng, forms, topic = self.random, self._talk.small["topic"], None
        if rng.random() < 0.2:
            question, text = self.unknown()[0], self._one(forms["unknown"])
        else:
            topic = rng.choice(self.topics)
            question, text = self._typed(self.question(topic)), self._one(forms["answers"]).format(title=topic.title)
        state = _State()
        answer = Answer(text, topic.id if topic else None, {}, {})
        self._exchange(state, self._one(forms["asking"]).format(question=question), answer)
        return state.chat()

    def described_style(self, style: Style, about: str = "own") -> str:
        """What the model says of its ``own`` answers, or of what its reader ``likes``."""
        forms = self._talk.small["style"]
        names = [pole_name(axis, style[axis]) for axis in AXES if axis in style]
        if not names:
            return str(self._one(forms["neutral"]))
        poles = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return str(self._one(forms[f"{about}_answers"]).format(poles=poles))

    # Asking.

    def draw_style(self, topic: Topic | None) -> dict[str, int]:
        """Poles to ask for, none in a quarter of the draws, and in training none that is held out."""
        rng = self.random
        while True:
            count = rng.choices((0, 1, 2, 3, 4), (0.25, 0.42, 0.22, 0.08, 0.03))[0]
            style = {axis: rng.choice((-1, 1)) for axis in rng.sample(AXES, count)}
            if self.split != "train" or self._is_seen(style, topic):
                return style

    def system_prompt(self, style: Style) -> str:
        """A system prompt that asks for ``style``, as prefmw composes it or as people write one."""
        rng, form = self.random, self.random.random()
        if form < 0.3:  # weights alone
            text = self.principles(style)
        elif form < 0.65:  # the paper's sentence, pole sentences behind it
            axis = rng.choice(list(style))
            persona = self.persona(axis, style[axis])
            others = {other: sign for other, sign in style.items() if other != axis}
            text = PERSONA_SENTENCE.format(persona=persona)
            if others or rng.random() < 0.2:
                text = f"{text} {self.principles(others or style)}"
        else:
            text = self.plain_request(style, system=True)
        if rng.random() < 0.05:
            creative = default_dimensions()["creativity"]
            text = f"{text} {creative.pole(rng.choice((-1, 1))).principle}"
        if rng.random() < 0.3:
            text = f"{self.plain_system_prompt()}{self._one((chr(10) * 2, ' '))}{text}"
        return text

    def plain_system_prompt(self) -> str:
        """A system prompt that asks for no style: an instruction, or what is known of a person besides."""
        small = self._talk.small
        if self.split != "train" or self.random.random() < 0.5:
            return str(self._one(small["system"]["plain"]))
        said = " ".join(self._one(self._talk.neutral) for _ in range(self._one((1, 1, 2))))
        return str(self._one(small["described"]["known"]).format(said=said))

    def principles(self, style: Style) -> str:
        """The pole sentences of ``style``, as :func:`prefmw.preferences.principle_text` writes them, in any order."""
        sentences = [self._principles[pole_name(axis, sign)] for axis, sign in style.items()]
        self._drawn += sentences
        return " ".join(sentences)

    def persona(self, axis: str, sign: int) -> str:
        """What somebody's stored persona might say who wants this pole."""
        words = self._styles.wordings[self.split][pole_name(axis, sign)]
        form = self.random.random()
        if form < 0.3:
            return self._worn(self._request(words)).rstrip(".")
        text = self._worn(self._described(words, stated=form < 0.55))
        return text if form < 0.85 else f"I'm {text}"

    def plain_request(self, style: Style, *, system: bool = False) -> str:
        """The poles asked for one after the other, as instructions or as descriptions of a person."""
        parts: list[str] = []
        for axis, sign in style.items():
            words = self._styles.wordings[self.split][pole_name(axis, sign)]
            form = self.random.random()
            if form < 0.5 or len(parts) == 2:
                parts.append(self._worn(self._request(words)))
            else:
                described = self._one(self._talk.small["described"]["system" if system else "user"])
                persona = self._worn(self._described(words, stated=form < 0.7))
                parts.append(described.format(persona=persona))
        return " ".join(parts)

    def _request(self, words: Wordings) -> str:
        """An instruction, or what somebody says who wants the pole."""
        return self._one(words.statements if words.statements and self.random.random() < 0.5 else words.requests)

    def _described(self, words: Wordings, *, stated: bool) -> str:
        """A persona that states the liking, or one that only implies it."""
        plain, further = (
            (words.personas, words.further_personas) if stated else (words.indirect, words.further_indirect)
        )
        return self._one((*plain, *further) if self.split == "train" else plain)

    def question(self, topic: Topic) -> str:
        """A first question about ``topic``."""
        if self.split != "train":
            return self._one(topic.held_out(self.split))
        if self.random.random() < 0.15:
            return str(self._one(self._talk.small["asking"]["about"]).format(title=topic.title))
        return self._one((*topic.questions, *topic.further["train"]))

    def unknown(self) -> tuple[str, str]:
        """A question beyond the topics, and its answer."""
        rng, unknown = self.random, self._talk.unknown
        if rng.random() < 0.5:
            question = self._one(unknown["questions"][self.split])
        else:
            noun = self._one(unknown["nouns"][self.split])
            question = self._one(unknown["templates"]["train"]).format(noun=noun)
        return self._typed(question), self._known(self._one(self._talk.small["unknown"]["answers"]))

    # Answering.

    def answer(self, topic: Topic, asked: Style, told: list[int] | None = None, points: int | None = None) -> Answer:
        """An answer about ``topic`` in the style ``asked``, of at most ``points`` facts; ``told``, those said before,
        is added to.

        Facts go round in their order, from any of them on: what comes next is easy to learn, and nothing comes twice.
        """
        rng, told, count = self.random, [] if told is None else told, len(topic.facts)
        is_first = not told
        following = ((told[-1] + 1 + step) % count if told else step for step in range(count))
        left = [index for index in following if index not in told]
        if not left:
            text = self._one(self._talk.small["exhausted"]["answers"]).format(title=topic.title)
            return Answer(text, topic.id, dict(asked), {})
        used: list[str] = []
        sentences: list[str] = []
        drawn: list[dict[str, int]] = []
        while left:
            skipped = rng.choices(range(len(left)), [(0.3 if told else 0.5) ** rank for rank in range(len(left))])[0]
            index, left = left[skipped], left[skipped + 1 :]
            told.append(index)
            values = {axis: self._value(asked.get(axis, 0)) for axis in AXES}
            drawn.append(values)
            if len(drawn) == 1 and is_first:
                sentences += self._opener(values, used)
            sentences += self._point(topic.facts[index], values, first=len(drawn) == 1, used=used)
            if rng.random() < _stop(values["verbosity"], len(drawn)) or len(drawn) == points:
                break
        if rng.random() < (0.05, 0.15, 0.6)[drawn[-1]["verbosity"] + 1]:
            sentences.append(topic.caveat)
        means = {axis: sum(values[axis] for values in drawn) / len(drawn) for axis in AXES}
        return Answer(" ".join(sentences), topic.id, dict(asked), means)

    def _value(self, asked: int) -> int:
        if asked and self.random.random() < self._follow_rate:
            return asked
        return self.random.choices((-1, 0, 1), (UNASKED, 1 - 2 * UNASKED, UNASKED))[0]

    def _opener(self, values: Style, used: list[str]) -> list[str]:
        """At most one sentence in front, for one of the styles drawn."""
        named = [pole_name(axis, sign) for axis, sign in values.items() if sign and axis != "formality"]
        if not named or self.random.random() < 0.35:
            return []
        return [self._fresh(self._styles.forms(self.split, "openers", self._one(named)), used)]

    def _point(self, fact: Fact, values: Style, *, first: bool, used: list[str]) -> list[str]:
        """One fact in the style drawn for it, as sentences."""
        rng, forms, level = self.random, self._styles.forms, _LEVELS[values["complexity"]]
        frame = _FRAMES[values["formality"]]
        act, reason = getattr(fact.act, level), getattr(fact.reason, level)
        text = self._fresh(forms(self.split, "frames", frame, "first" if first else "next"), used).format(act=act)
        if values["verbosity"] > 0:
            text += self._one(forms(self.split, "frames", frame, "example")).format(example=fact.example)
        if values["verbosity"] < 0:
            sentences = [text]
            if values["complexity"] < 0 and rng.random() < 0.6:
                sentences.append(self._fresh(forms(self.split, "elementary", "alone"), used))
        elif values["complexity"] < 0:
            sentences = [text, self._fresh(forms(self.split, "elementary", "reason"), used), reason]
        elif values["verbosity"] > 0:
            sentences = [text, self._fresh(forms(self.split, "frames", frame, "reason"), used).format(reason=reason)]
        else:
            sentences = [text + self._fresh(forms(self.split, "frames", frame, "because"), used).format(reason=reason)]
        sentences = [_sentence(sentence) for sentence in sentences]
        if values["humor"] > 0:
            sentences.append(fact.joke)
            if rng.random() < 0.25:
                sentences.append(self._fresh(forms(self.split, "tags", "humorous"), used))
        elif values["humor"] < 0:
            sentences.append(self._fresh(forms(self.split, "tags", "serious"), used))
        if values["friendliness"]:
            name = pole_name("friendliness", values["friendliness"])
            sentences.append(self._fresh(forms(self.split, "tags", name), used))
        return sentences

    # Conversation.

    def _says(self, state: _State, role: Literal["system", "user", "assistant"], text: str) -> None:
        state.messages.append(Message(role, text))
        state.sources.append(tuple(self._drawn))
        self._drawn.clear()

    def _exchange(self, state: _State, question: str, answer: Answer) -> None:
        self._says(state, "user", question)
        self._says(state, "assistant", answer.text)
        state.answers.append(answer)

    def _turn(self, state: _State, *, first: bool) -> str:
        """The user's next words, and what they do to ``state``."""
        rng = self.random
        assert state.topic is not None
        if first:
            return self._typed(self.question(state.topic))
        if rng.random() < 0.2:
            state.topic, state.told = rng.choice(self._allowed_topics(state.asked)), []
            return self._typed(self.question(state.topic))
        if rng.random() < 0.65:
            return self._typed(self._one(self._talk.small["asking"]["more"][self.split]))
        return self._typed(self._one(state.topic.followups))

    def _changed_mind(self, state: _State) -> str:
        """A pole asked for in mid-conversation, from here on."""
        for _ in range(20):
            axis, sign = self._one(AXES), self._one((-1, 1))
            if self.split != "train" or self._is_seen({**state.asked, axis: sign}, state.topic):
                state.asked[axis] = sign
                return self._worn(self._one(self._styles.wordings[self.split][pole_name(axis, sign)].requests))
        return ""

    def _reply(self, state: _State) -> Answer:
        assert state.topic is not None
        return self.answer(state.topic, state.asked, state.told, state.points)

    def _small_talk(self) -> tuple[str, str]:
        exchange = self._one(self._talk.small["exchanges"])
        return self._one(exchange["said"]), self._known(self._one(exchange["answers"]))

    def _known(self, answer: str) -> str:
        first = self.random.randrange(len(self.topics))
        second = (first + len(self.topics) // 2) % len(self.topics)  # so that none is named twice
        return answer.format(known=f"{self.topics[first].title} and {self.topics[second].title}")

    def _worn(self, text: str, most: float = 0.3) -> str:
        """In training, most times, with some of its words lost, up to that share: so that a meaning is learned from all
        the words that carry it, not from a sentence known by heart. Words that turn a meaning round are never lost.
        """
        self._drawn.append(text)
        if self.split != "train":
            return text
        lost = most * self._one((0.0, 0.0, 0.5, 1.0))
        first, *rest = text.split(" ")
        kept = [word for word in rest if _TURNS_ROUND.search(word) or self.random.random() > lost]
        return " ".join([first, *kept])

    def _keywords(self, text: str) -> str:
        """A question as people type it into a search box: what carries its meaning, often in another order."""
        words = [word for word in re.findall(r"[\w'-]+", text.lower()) if word not in _FUNCTION_WORDS]
        if len(words) < 2:
            return text
        if self.random.random() < 0.5:
            self.random.shuffle(words)
        return " ".join(words[:8])

    def _typed(self, text: str) -> str:
        """As people type: now and then with words around, in lower case, without the last mark, or with a slip; in
        training also in keywords, or beside something of their own that has nothing to do with it.
        """
        rng, asking = self.random, self._talk.small["asking"]
        text = self._worn(text, most=0.4)
        if self.split == "train" and rng.random() < 0.15:
            return self._keywords(text)
        if self.split == "train" and rng.random() < 0.12:
            aside = self._one(self._talk.neutral)
            return f"{aside} {text}" if rng.random() < 0.6 else f"{text} {aside}"
        if rng.random() < 0.15:
            before = self._one(asking["before"])
            text = before + (text if before.rstrip()[-1] in ".!" else text[0].lower() + text[1:])
        if rng.random() < 0.08:
            text += self._one(asking["after"])
        if rng.random() < 0.1:
            text = text.lower()
        if rng.random() < 0.1:
            text = text.rstrip("?.!")
        if rng.random() < 0.06 and len(text) > 12:
            at = rng.randrange(4, len(text) - 4)
            text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        return text

    # Drawing.

    def _is_seen(self, style: Style, topic: Topic | None) -> bool:
        """Whether training may ask for all of this at once, and of this topic."""
        named = {pole_name(axis, sign) for axis, sign in style.items()}
        if topic is not None and named & set(topic.unseen_styles.values()):
            return False
        pairs = self._styles.unseen_pairs
        return not any(pair <= named for pair in (*pairs["dev"], *pairs["test"]))

    def _allowed_topics(self, style: Style) -> Sequence[Topic]:
        if self.split != "train":
            return self.topics
        return [topic for topic in self.topics if self._is_seen(style, topic)]

    def _one(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def _fresh(self, options: Sequence[str], used: list[str]) -> str:
        """One of ``options`` that this answer has not used yet, while there is one: any of them first, later one of the
        next three behind the last, so that a model sees from that one what may come.
        """
        last = next((text for text in reversed(used) if text in options), None)
        behind = options.index(last) + 1 if last else 0
        turned = [*options[behind:], *options[:behind]]
        left = [option for option in turned if option not in used] or turned
        choice = self._one(left[:3] if last else left)
        used.append(choice)
        return choice


def _stop(verbosity: int, points: int) -> float:
    """The probability that an answer ends after that many points, the last one's verbosity being ``verbosity``."""
    chances = {-1: (0.9, 1.0), 0: (0.2, 0.7, 1.0), 1: (0.02, 0.1, 0.4, 0.7, 1.0)}[verbosity]
    return chances[min(points, len(chances)) - 1]


def _sentence(text: str) -> str:
    """With a capital and a full stop."""
    text = text[0].upper() + text[1:]
    return text if re.search(r"[.!?]$", text) else text + "."
