"""Why a reply reads as it does: which of its tokens the person's preference changed, and by how much.

Every token is put beside what the same model says of it in the same place of the same reply where no preference is
known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefmw.alignment import Combined, nucleus, redistributed, top_k
from prefmw.decoding import Request, Sampling
from prefmw.decoding.forced import look_into
from prefmw.errors import UsageError
from prefmw.models import ChatModel, Detokenizer
from prefmw.plans import Plan
from prefmw.preferences import Dial, Message, PreferenceStore, RecordedTurn
from prefmw.steering import Backend, build_request

ALTERNATIVES = 5
"""Likeliest tokens of either distribution that are kept beside the one said."""


class Likelihood(NamedTuple):
    """A token in one place of a reply. ``aligned`` and ``plain`` are log-probabilities in nats, with and without the
    preference; ``end`` says that it ends the reply and has no text.
    """

    token: int
    text: str
    end: bool
    aligned: float
    plain: float

    @property
    def change(self) -> float:
        """What the preference did to it: log of the factor by which it became likelier, nats."""
        return self.aligned - self.plain

    def as_json(self) -> dict[str, Any]:
        """With numbers to four digits; JSON has no infinity, so what is impossible is ``null``."""
        numbers = {"aligned": self.aligned, "plain": self.plain, "change": self.change}
        rounded = {name: round(value, 4) if math.isfinite(value) else None for name, value in numbers.items()}
        return {"token": self.token, "text": self.text, "end": self.end, **rounded}


@dataclass(frozen=True)
class Step:
    """One token of a reply, as it was said, and the likeliest tokens of either distribution there. ``moved`` is the
    share of the probability that the preference moved from some tokens to others, half the sum of |aligned - plain|.
    """

    said: Likelihood
    alternatives: tuple[Likelihood, ...]
    moved: float

    @property
    def plain_favourite(self) -> Likelihood:
        """What would be likeliest without the preference."""
        return max(self.alternatives, key=lambda one: one.plain)

    def as_json(self) -> dict[str, Any]:
        """The token with its ``alternatives``, the likeliest under the preference first."""
        return {
            **self.said.as_json(),
            "moved": round(self.moved, 4),
            "alternatives": [one.as_json() for one in self.alternatives],
        }


@dataclass(frozen=True)
class Explanation:
    """A reply looked into, token by token; ``weights`` are the person's by dimension when it was made."""

    plan: Plan
    weights: Mapping[str, float]
    prompt: str
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """The reply."""
        return "".join(step.said.text for step in self.steps)

    def most_changed(self, count: int) -> list[Step]:
        """The tokens that the preference made more or less likely by the most, those first."""
        return sorted(self.steps, key=lambda step: -abs(step.said.change))[:count]

    def as_json(self) -> dict[str, Any]:
        """All of it but whose it is."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "method": self.plan.method,
            "strength": self.plan.strength,
            "seed": self.plan.sampling.seed,
            "revision": self.plan.revision,
            "principle": self.plan.principle,
            "weights": dict(self.weights),
            "dials": {dial.dimension: dial.as_json() for dial in self.plan.dials},
            "tokens": [step.as_json() for step in self.steps],
        }


def explain(
    plan: Plan, messages: Sequence[Message], token_ids: Sequence[int], ended: bool, backend: Backend
) -> Explanation:
    """What the preference did to each token of a reply.

    The aligned distribution is the method's before anything is cut off (:func:`prefmw.alignment.redistributed`), the
    plain one the model's in the same conversation without the preference, both at temperature 1. So of a reply by
    method ``none`` nothing is changed.

    Args:
        plan: how the reply was steered.
        messages: the conversation that it answers.
        token_ids: the reply's.
        ended: whether the model ended it, which is a token as well.
        backend: the model and engine that made it.

    Raises:
        UsageError: there is no token, or the plan is PAD's by another PersRM than the backend's.
        EngineError: the engine failed.
    """
    chat = backend.chat
    tokens = [*token_ids, *(sorted(chat.template.end_of_turn or chat.stop_ids)[:1] if ended else [])]
    if not tokens:
        raise UsageError("this reply has no token to explain")
    request, plain = _request(plan, messages, backend), _plain_view(plan, messages, chat)
    same = [index for index, view in enumerate(request.views) if view == plain]
    look = partial(_look, bounds=request.sampling, place=same[0] if same else -1)
    (seen,) = look_into([(request, tokens)], backend.engine, look, onlookers=() if same else (plain,))
    weights = {key: weight.value for key, weight in plan.weights.items()}
    return Explanation(plan, weights, messages[-1].content, tuple(_steps(tokens, seen, chat)))


class _Seen(NamedTuple):
    """Token ids, the one said first, and their log-probabilities."""

    ids: list[int]
    aligned: list[float]
    plain: list[float]
    moved: float


def _look(combined: Combined, views: Sequence[Tensor], tokens: Tensor, *, bounds: Sampling, place: int) -> list[_Seen]:
    keep = nucleus(combined.rule, bounds.top_p, bounds.temperature)
    if bounds.top_k is not None:
        keep &= top_k(combined.rule, bounds.top_k)
    rows = redistributed(combined.logits, combined.rule, keep)
    found = []
    for aligned, plain, token in zip(rows, views[place].float().log_softmax(1), tokens.tolist(), strict=True):
        count = min(ALTERNATIVES, len(aligned))
        likeliest = torch.cat([aligned.topk(count).indices, plain.topk(count).indices]).tolist()
        ids = list(dict.fromkeys([token, *likeliest]))
        moved = float((aligned.exp() - plain.exp()).abs().sum() / 2)
        found.append(_Seen(ids, aligned[ids].tolist(), plain[ids].tolist(), moved))
    return found


def _steps(tokens: Sequence[int], seen: Sequence[_Seen], chat: ChatModel) -> list[Step]:
    """Token ids as texts. A character that spans tokens is the last one's."""
    pieces, detokenizer, said = [], Detokenizer(chat.tokenizer), []
    for token in tokens:
        pieces.append("" if token in chat.stop_ids else detokenizer.push(token))
    last = max((index for index, token in enumerate(tokens) if token not in chat.stop_ids), default=0)
    pieces[last] += detokenizer.finish()
    for index, (piece, one) in enumerate(zip(pieces, seen, strict=True)):
        rows = [
            Likelihood(
                token,
                piece if place == 0 else _text_behind(tokens[max(0, index - 8) : index], token, chat),
                token in chat.stop_ids,
                aligned,
                plain,
            )
            for place, (token, aligned, plain) in enumerate(zip(one.ids, one.aligned, one.plain, strict=True))
        ]
        alternatives = sorted(rows, key=lambda row: -row.aligned)
        said.append(Step(rows[0], tuple(alternatives), one.moved))
    return said


def _text_behind(before: Sequence[int], token: int, chat: ChatModel) -> str:
    """A token's text where it stands behind others, since some tokenizers join neighbours by a space."""

    def text(ids: Sequence[int]) -> str:
        decoded = chat.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)

    return text([*before, token])[len(text(before)) :]


def _request(plan: Plan, messages: Sequence[Message], backend: Backend) -> Request:
    guidance = scale = None
    if plan.method == "pad" and plan.principle:
        guidance = backend.guidance()
        if plan.persrm not in (None, guidance.label):
            raise UsageError(
                f"this reply was guided by the PersRM {plan.persrm}, and the one at hand is {guidance.label}; name "
                "that one with --persrm"
            )
        scale = guidance.scale(plan.principle)
    arithmetic = backend.arithmetic() if plan.method == "dpa" else None
    if arithmetic is not None and plan.dpa not in (None, arithmetic.label):
        raise UsageError(
            f"this reply followed the DPA checkpoint {plan.dpa}, and the one at hand is {arithmetic.label}; name that "
            "one with --dpa"
        )
    if arithmetic is not None and arithmetic.chat is not backend.chat:
        raise UsageError(
            f"the DPA checkpoint {arithmetic.label} is a chat model of its own; name it with -m as well, so that its "
            "reply is compared with its own plain one"
        )
    return build_request(plan, messages, backend.chat, guidance, scale, arithmetic)


def _plain_view(plan: Plan, messages: Sequence[Message], chat: ChatModel) -> Any:
    plain = Plan("none", None, "", 0, {}, plan.sampling, tools=plan.tools, opening=plan.opening)
    return build_request(plain, messages, chat).views[0]


def find_turn(store: PreferenceStore, user_id: str, turn_id: int | None) -> tuple[RecordedTurn, list[Message]]:
    """A user's turn, by default the last one of their latest conversation, and the conversation that it answers.

    Raises:
        UsageError: the user has no such turn, or none at all.
        StoreError: the database failed.
    """
    for entry in store.conversations(user_id):
        turns = store.turns(user_id, entry.id)
        wanted = [turn for turn in turns if turn_id in (None, turn.id)]
        if wanted:
            return wanted[-1], _answered_by(wanted[-1], turns)
    which = "no turn yet" if turn_id is None else f"no turn {turn_id}"
    raise UsageError(f"'{user_id}' has {which}; see: prefmw logs show {user_id}")


def _answered_by(turn: RecordedTurn, turns: Sequence[RecordedTurn]) -> list[Message]:
    """The messages that a turn of a conversation answers, its system prompt first."""
    earlier = [other for other in turns if other.id < turn.id]
    replaced = {other.replaces for other in earlier if other.text} | {turn.replaces}
    messages = [Message("system", turn.system)] if turn.system else []
    for other in earlier:
        messages += other.history
        if other.text and other.id not in replaced:
            messages += [Message("user", other.prompt)] if other.prompt else []
            messages += [Message("assistant", other.text)]
    return [*messages, *turn.history, *([Message("user", turn.prompt)] if turn.prompt else [])]


def explain_turn(turn: RecordedTurn, messages: Sequence[Message], backend: Backend) -> Explanation:
    """:func:`explain` for a stored reply.

    Raises:
        UsageError: it was edited by its reader, made by another model than the backend's, or reads differently today.
    """
    chat = backend.chat
    if turn.finish_reason == "edited":
        raise UsageError(
            f"turn {turn.id} is its reader's own wording; the reply that it stands for is turn {turn.replaces}"
        )
    if (turn.model_revision, turn.model) != (chat.revision, chat.name):
        raise UsageError(
            f"turn {turn.id} was made by '{turn.model}' at revision {turn.model_revision[:12]}, and the model at hand "
            f"is '{chat.name}' at {chat.revision[:12]}; name that one with --model"
        )
    plan = _plan_of(turn)
    said = Detokenizer(chat.tokenizer)
    text = "".join(map(said.push, turn.token_ids)) + said.finish()
    ended = (
        turn.finish_reason == "stop" and text == turn.text
    )  # a stop string ends a reply and its text, not the tokens
    read = max(len(view.context) for view in _request(plan, messages, backend).views)
    if read != turn.input_tokens:
        raise UsageError(
            f"turn {turn.id} was read in {turn.input_tokens} tokens of context, which are {read} today: the chat "
            "template, its options or the conversation changed since"
        )
    return replace(explain(plan, messages, turn.token_ids, ended, backend), weights=turn.plan["weights"])


def _plan_of(turn: RecordedTurn) -> Plan:
    """The plan that a turn was recorded with.

    Raises:
        UsageError: its dials acted by another rule than today's.
    """
    stored: Mapping[str, Any] = turn.plan
    if any("midpoint" not in dial for dial in stored.get("dials", {}).values()):
        raise UsageError(
            f"turn {turn.id} was made by dials of an earlier version, which act otherwise today; ask again"
        )
    bounds = stored["candidates"]
    opening = stored.get("opening", "")
    return Plan(
        method=turn.method,
        strength=turn.strength,
        principle=stored["principle"],
        revision=turn.revision,
        weights={},
        sampling=Sampling(max_tokens=max(1, len(turn.token_ids)), seed=turn.seed, **bounds),
        dials=tuple(Dial(key, **dial) for key, dial in stored.get("dials", {}).items()),
        candidate=stored.get("candidate"),
        persrm=stored.get("persrm"),
        dpa=stored.get("dpa"),
        tools=tuple(stored.get("tools", ())),
        opening=((opening, True),) if opening else (),
    )
