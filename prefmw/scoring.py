"""Zero-shot attribute scores: how much likelier a reply is where the model is asked for one pole than for the other.

No reward model is needed: the chat model reads a finished reply twice a dimension, and what its own conditional
probabilities say is the score. Source: Drift's zero-shot rewarding, between opposite poles where the paper has an
attribute and none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefmw.decoding import Request, Sampling
from prefmw.errors import ContextLengthError, UsageError
from prefmw.models import ChatModel
from prefmw.plans import Plan
from prefmw.preferences import Dimensions, Message
from prefmw.steering import Backend, build_request, with_principle

Progress = Callable[[float], None]
"""Told the share that is done."""

CALIBRATION = 1
"""The number of the way in which :func:`measured_scale` measures; what another one measured is not comparable."""

TYPICAL = Sampling(temperature=1.0, top_p=0.95, top_k=None, max_tokens=320, seed=0)
"""How the replies are drawn that a scale is measured on."""


class Exchange(NamedTuple):
    """A conversation with a user's message last, a reply to it, and whether that came to its end or was cut off."""

    messages: Sequence[Message]
    reply: str
    ended: bool = True


def scored_dimensions(dimensions: Dimensions) -> tuple[str, ...]:
    """The style dimensions that have two poles, in the registry's order."""
    return tuple(key for key, dimension in dimensions.items() if dimension.kind == "style" and dimension.negative)


def attribute_scores(
    exchanges: Sequence[Exchange],
    backend: Backend,
    dimensions: Dimensions,
    progress: Progress = lambda share: None,
) -> NDArray[np.float64]:
    """Each reply's score on every dimension of :func:`scored_dimensions`, (R, K), in nats a token.

    ::

        f_k(y) = mean over y's tokens of  log p(y_t | x, pole k+, y_<t) - log p(y_t | x, pole k-, y_<t)

    The token that ends a turn counts as one of the reply's, where it ended, so that brevity shows. A reply beyond the
    model's context is read as far as that goes.

    Raises:
        UsageError: an empty reply, or no dimension to score.
        ContextLengthError: a conversation fills the model's context.
        ChatTemplateError: a reply holds what the tokenizer would read as a control token.
    """
    chat, keys = backend.chat, scored_dimensions(dimensions)
    if not keys:
        raise UsageError("no dimension has two poles to tell apart")
    pairs = []
    for exchange in exchanges:
        if not exchange.reply.strip():
            raise UsageError("an empty reply has no score")
        poles = [dimensions[key].pole(weight).principle for key in keys for weight in (1.0, -1.0)]
        contexts = [chat.template.encode(with_principle(exchange.messages, pole, chat)) for pole in poles]
        room = chat.capacity - max(map(len, contexts))
        if room < 1:
            raise ContextLengthError(f"a conversation leaves no room for its reply in the context of '{chat.name}'")
        said = reply_tokens(exchange, chat)[:room]
        pairs += [(context, said) for context in contexts]
    means = [float(tokens.mean()) for tokens in backend.engine.log_probabilities(pairs, progress)]
    read = np.array(means).reshape(len(exchanges), len(keys), 2)
    return np.asarray(read[:, :, 0] - read[:, :, 1])


def reply_tokens(exchange: Exchange, chat: ChatModel) -> list[int]:
    """A reply's tokens as the model would say them, with the end of its turn where it came to one."""
    ends = sorted(chat.template.end_of_turn) if exchange.ended else []
    return [*chat.template.encode_reply(exchange.reply), *ends[:1]]


def measured_scale(
    questions: Sequence[str], backend: Backend, dimensions: Dimensions, progress: Progress = lambda share: None
) -> Scale:
    """The scale of a model's own plain replies to ``questions``."""
    exchanges: list[Exchange] = []
    for at in range(0, len(questions), 32):
        asked = [[Message("user", question)] for question in questions[at : at + 32]]
        plans = [Plan("none", None, "", 0, {}, replace(TYPICAL, seed=at + index)) for index in range(len(asked))]
        requests = [build_request(plan, messages, backend.chat) for plan, messages in zip(plans, asked, strict=True)]
        replies = spoken(requests, backend)
        exchanges += [
            Exchange(messages, *reply) for messages, reply in zip(asked, replies, strict=True) if reply[0].strip()
        ]
        progress(0.5 * min(1.0, (at + 32) / len(questions)))
    scores = attribute_scores(exchanges, backend, dimensions, lambda share: progress(0.5 + 0.5 * share))
    return Scale.of(scores, scored_dimensions(dimensions))


def spoken(requests: Sequence[Request], backend: Backend) -> list[tuple[str, bool]]:
    """The replies to requests that are decoded together: their texts, and whether they came to their end. An
    interruption cancels those under way.
    """
    with ExitStack() as stack:
        generations = [stack.enter_context(backend.engine.submit(request)) for request in requests]
        texts = [backend.chat.tokenizer.decode(list(one), skip_special_tokens=True) for one in generations]
        return [(text, one.finish_reason == "stop") for text, one in zip(texts, generations, strict=True)]


@dataclass(frozen=True)
class Scale:
    """What a model's scores are usually like: their means and standard deviations over its own plain replies, (K,)
    each. In deviations from the mean, scores of several dimensions and models can be compared and learned from.
    """

    dimensions: tuple[str, ...]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @staticmethod
    def of(scores: NDArray[np.float64], dimensions: tuple[str, ...]) -> Scale:
        """The scale of plain replies' scores (R, K).

        Raises:
            UsageError: fewer than two replies, or all alike on a dimension.
        """
        if len(scores) < 2 or not (scores.std(axis=0) > 0).all():
            raise UsageError("a scale needs replies that differ on every dimension")
        return Scale(dimensions, scores.mean(axis=0), scores.std(axis=0, ddof=1))

    def standardise(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores (..., K) in deviations from the mean."""
        return np.asarray((scores - self.mean) / self.deviation)

    def to_json(self) -> str:
        """As a calibration file holds it."""
        rows = zip(self.dimensions, self.mean, self.deviation, strict=True)
        return json.dumps({key: {"mean": mean, "deviation": deviation} for key, mean, deviation in rows}, indent=1)

    @staticmethod
    def from_json(text: str) -> Scale:
        """What :meth:`to_json` wrote.

        Raises:
            UsageError: it is something else.
        """
        try:
            table: Mapping[str, Any] = json.loads(text)
            mean, deviation = (np.array([float(row[name]) for row in table.values()]) for name in ("mean", "deviation"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"this is no calibration: {error}") from error
        if not table or not (np.isfinite(mean).all() and (deviation > 0).all()):
            raise UsageError("a calibration names dimensions, their finite means and deviations above 0")
        return Scale(tuple(table), mean, deviation)
