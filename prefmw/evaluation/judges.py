"""Which of two replies suits a person better: a judge is a function, so that any judge takes another's place.

A judge is given cases and says of each 1 where the reply suits the person better than its rival, 0 where the rival
does, 0.5 where neither does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from prefmw.errors import UsageError
from prefmw.evaluation.held_out import Item
from prefmw.evaluation.oracles import measure
from prefmw.preferences import Message
from prefmw.steering import Backend

SYSTEM = (
    "You compare two answers to a question for the person who asked it. Judge only how well each answer suits that "
    "person, not its length or its place."
)

ASKED = (
    "The person's preference: {preference}\n\nQuestion: {question}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n"
    "Which answer suits the person better, A or B?"
)

EVEN = 1e-3
"""Log-odds, nats, below which a chat model prefers neither: rounding is as large."""

CLEAR = 0.05
"""How far the oracle's means must lie apart."""


class Case(NamedTuple):
    """A reply and its rival to one question of one person; ``item`` where the question is a held-out one."""

    question: str
    preference: str
    reply: str
    rival: str
    item: Item | None


Judge = Callable[[Sequence[Case]], list[float]]


def model_judge(backend: Backend) -> Judge:
    """A chat model as judge. It is asked in both orders, and says A or B by which of the two it holds likelier as the
    next word; an answer wins whose mean probability over the orders is above a half.
    """
    letters = [backend.chat.template.encode_reply(letter) for letter in ("A", "B")]

    def judge(cases: Sequence[Case]) -> list[float]:
        pairs = []
        for case in cases:
            for first, second in ((case.reply, case.rival), (case.rival, case.reply)):
                asked = ASKED.format(
                    preference=case.preference or "none", question=case.question, first=first, second=second
                )
                messages = [Message("system", SYSTEM), Message("user", asked)]
                context = backend.chat.template.encode(messages, opening=(("Answer ", False),))
                pairs += [(context, letter) for letter in letters]
        read = [float(one.sum()) for one in backend.engine.log_probabilities(pairs)]
        verdicts = []
        for at in range(0, len(read), 4):
            first_a, first_b, second_a, second_b = read[at : at + 4]
            leaning = (first_a - first_b) + (second_b - second_a)  # log-odds for the reply, both orders together
            verdicts.append(0.5 if abs(leaning) < EVEN else float(leaning > 0))
        return verdicts

    return judge


def oracle_judge(cases: Sequence[Case]) -> list[float]:
    """The oracles as judge: the reply wins whose measures lie further towards the poles asked for.

    Raises:
        UsageError: a case is no held-out question, so nobody knows which poles are asked for.
    """
    verdicts = []
    for case in cases:
        if case.item is None:
            raise UsageError("the oracle judges held-out questions alone; name a chat model with --judge")
        ahead = towards(case.reply, case.item) - towards(case.rival, case.item)
        verdicts.append(0.5 if abs(ahead) < CLEAR else float(ahead > 0))
    return verdicts


def towards(text: str, item: Item) -> float:
    """How far a reply lies towards the poles that an item asks for, in [-1, 1]."""
    measures = measure(text)
    return sum(measures[axis] * sign for axis, sign in item.wanted.items()) / len(item.wanted)
