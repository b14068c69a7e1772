"""Does a method make replies what a person asked for, and at what price? Methods and controls on held-out questions.

Every condition answers the same items through the plan and the engine of a user's turn. Controls:

- ``sharpened``: (1 + ratio) z1 without z0, so whatever is gained by mere certainty is seen.
- ``shuffled``: Linear Alignment with the principle of a person who asks for nothing on that axis.
- ``prompt`` at other temperatures.
- ``best-of-N``: prompting sampled N times, the reply kept whose tokens the principle makes likeliest,
  sum of log p(y | with) - log p(y | without): what Linear Alignment does by the token, done by the reply.
- beside PAD: ``pad-prefix`` (W = 0: the preference in the prefix alone), ``pad-weights`` (in w_p alone: nobody reads
  the prefix), ``persrm`` (beta 1 on its own backbone: the PersRM alone within the base's candidates) and
  ``pad-best-of-10`` (the base's replies, the one that the PersRM rewards most).
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from prefmw.alignment import Combined
from prefmw.decoding import Request, Sampling
from prefmw.decoding.many import decode_all
from prefmw.errors import UsageError
from prefmw.evaluation.content import read_content, repeats
from prefmw.evaluation.held_out import KINDS, Item, held_out_items
from prefmw.evaluation.oracles import followed, measure
from prefmw.evaluation.runs import Run
from prefmw.evaluation.second_opinion import SecondOpinion
from prefmw.evaluation.statistics import cluster_interval
from prefmw.plans import Defaults, Plan, candidate_rule, make_plan
from prefmw.preferences import (
    BEST_OF_K,
    GREEDY,
    PAD_TEMPERATURE,
    PAD_TOP_K,
    STRENGTHS,
    Dimensions,
    Message,
    Profile,
    check_candidate,
    check_method,
    check_strength,
    principle_text,
)
from prefmw.steering import Backend, build_request
from prefmw.training.styles import AXES, Split

MAX_TOKENS = 320
"""Room for a reply: the corpus's longest answers take about 250 tokens."""

TOP_P = Defaults.top_p
"""The nucleus of the candidate rule, prefmw's default."""


@dataclass(frozen=True)
class Condition:
    """One row's way of answering: a method of prefmw or a control, its strength, and the temperature; ``top_k`` is
    PAD's, where it is not the default.
    """

    name: str
    strength: float | None = None
    temperature: float = 0.7
    top_k: int | None = None

    @property
    def label(self) -> str:
        """As a table shows it."""
        name = self.name if self.strength is None else f"{self.name} {self.strength:g}"
        return name if self.top_k is None else f"{name} k={self.top_k}"

    @property
    def is_pad(self) -> bool:
        """Whether a PersRM guides it."""
        return self.name.startswith(("pad", "persrm"))


@dataclass(frozen=True)
class Answered:
    """An item with its reply under one condition, and what the measures say of it; ``asked`` are the axes that the item
    or the principle applied asks for.
    """

    item: Item
    text: str
    asked: frozenset[str]
    measures: dict[str, float]
    relevant: bool
    helpfulness: float
    repeats: bool

    def as_json_line(self, condition: Condition) -> str:
        """All of it as a line of JSON."""
        item = self.item
        return (
            json.dumps(
                {
                    "method": condition.name,
                    "strength": condition.strength,
                    "temperature": condition.temperature,
                    "top_k": condition.top_k,
                    "topic": item.topic.id,
                    "question": item.question,
                    "more": item.more,
                    "kind": item.kind,
                    "axis": item.axis,
                    "wanted": item.wanted,
                    "persona": item.profile.persona,
                    "text": self.text,
                    "measures": {axis: round(value, 4) for axis, value in self.measures.items()},
                    "followed": self.followed,
                    "relevant": self.relevant,
                    "helpfulness": self.helpfulness,
                    "repeats": self.repeats,
                }
            )
            + "\n"
        )

    @property
    def followed(self) -> bool:
        """Whether the reply has the pole asked for on the item's axis."""
        return followed(self.measures[self.item.axis], self.item.wanted[self.item.axis])


def conditions(
    methods: Sequence[str],
    strengths: Sequence[float],
    temperature: float,
    *,
    controls: bool,
    candidate: str | None = None,
    top_ks: Sequence[int] = (),
) -> list[Condition]:
    """The rows of a table: each method, once per strength where it takes one, then the controls. ``candidate`` is how
    PAD picks, and each of ``top_ks`` a row more of it.

    Raises:
        UsageError: an unknown method, or a strength, a bound or the temperature out of range.
    """
    for k in top_ks or [None]:  # type: ignore[list-item]
        Sampling(temperature=temperature, top_p=TOP_P, top_k=k, max_tokens=MAX_TOKENS, seed=0)  # checks its bounds
    check_candidate(candidate)
    rows = []
    for method in methods:
        if check_method(method) == "auto":
            raise UsageError("name the methods to compare; auto is whichever of them a profile calls for")
        if method == "dpa":
            raise UsageError("directions are measured by 'prefmw eval control'; name other methods to compare here")
        for strength in (strengths or [None]) if STRENGTHS[method] else [None]:  # type: ignore[list-item]
            strength = check_strength(method, strength)
            if method != "pad":
                rows.append(Condition(method, strength, temperature))
                continue
            heat = 0.0 if candidate == GREEDY else temperature or (0.0 if candidate is None else PAD_TEMPERATURE)
            for k in top_ks or [None]:  # type: ignore[list-item]
                name = f"pad-best-of-{k or PAD_TOP_K}" if candidate == BEST_OF_K else "pad"
                rows.append(Condition(name, strength, heat, k))
    if controls:
        for ratio in [row.strength for row in rows if row.name == "linear"]:
            rows += [Condition("sharpened", ratio, temperature), Condition("shuffled", ratio, temperature)]
        for row in [row for row in rows if row.name == "pad"]:
            rows += [replace(row, name=name) for name in ("pad-prefix", "pad-weights")]
            if row.strength != 1:
                rows.append(replace(row, name="persrm", strength=1.0))
            if temperature > 0:
                rows.append(replace(row, name=f"pad-best-of-{PAD_TOP_K}"))
        rows += [Condition("prompt", None, heat) for heat in (0.3, 1.0) if heat != temperature]
        if temperature > 0:
            rows.append(Condition("best-of-4", None, temperature))
    return list(dict.fromkeys(rows))


def ask_items(
    items: Sequence[Item],
    condition: Condition,
    backend: Backend,
    dimensions: Dimensions,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[str], float]:
    """Every item's reply under one condition, and the seconds it took per token of those replies, many at a time.

    A second-turn item's first reply comes from the same condition. ``progress`` is told how many replies are done.
    """
    profiles = [other.profile for other in _applied(items, condition, seed)]
    opened = [[Message("user", item.question)] for item in items]
    texts, seconds, tokens = replies_to(opened, profiles, condition, backend, dimensions, seed, progress)
    later = [index for index, item in enumerate(items) if item.more]
    if later:
        longer = [
            [*opened[index], Message("assistant", texts[index] or "…"), Message("user", items[index].more)]
            for index in later
        ]
        people = [profiles[index] for index in later]
        again = replies_to(longer, people, condition, backend, dimensions, seed + len(items), lambda count: None)
        seconds, tokens = seconds + again[1], tokens + again[2]
        for index, text in zip(later, again[0], strict=True):
            texts[index] = text
    return texts, seconds / max(1, tokens)


def answer_items(
    items: Sequence[Item], condition: Condition, backend: Backend, dimensions: Dimensions, *, seed: int = 0
) -> tuple[list[Answered], float]:
    """:func:`ask_items` with what the measures say of the replies."""
    texts, seconds = ask_items(items, condition, backend, dimensions, seed=seed)
    return read_replies(items, texts, condition, seed), seconds


def read_replies(items: Sequence[Item], texts: Sequence[str], condition: Condition, seed: int = 0) -> list[Answered]:
    """What the measures say of the replies that :func:`ask_items` gave."""
    return [
        _read(item, text, frozenset(item.wanted) | frozenset(other.wanted))
        for item, text, other in zip(items, texts, _applied(items, condition, seed), strict=True)
    ]


def steer_rows(
    split: Split,
    rows: Iterable[Condition],
    n: int,
    backend: Backend,
    dimensions: Dimensions,
    *,
    seed: int = 0,
    further: bool = False,
    judge: SecondOpinion | None = None,
    run: Run | None = None,
    progress: Callable[[Condition, int], None] = lambda condition, count: None,
    keep: Callable[[Condition, list[Answered]], None] = lambda condition, answered: None,
) -> list[dict[str, Any]]:
    """The table: per condition one row an axis and one over all, ``n`` items an axis, ``further`` ones where asked.

    Row keys are those of ``prefmw eval steer --json``. ``ci95`` resamples preferences, not replies; ``over_prompt`` is
    the paired difference to prompting at the same temperature, where that came before; ``off_axis`` the mean size of
    the measures of axes that nobody asked for; ``cost_ratio`` the time per token of a reply over that of ``none``, many
    replies at a time. A ``run`` keeps each condition's replies, and takes those that it has; ``second_opinion``, where
    there is a ``judge``, ``followed`` by its verdict.
    """
    run = run or Run("steer", {})
    items = list(held_out_items(split, n, seed=seed, further=further))
    ask_items(items[:4], Condition("none"), backend, dimensions)  # warms up, for the sake of the timing
    table: list[dict[str, Any]] = []
    costs: dict[Condition, float] = {}
    prompted: dict[float, list[Answered]] = {}
    for condition in rows:

        def answer(condition: Condition = condition) -> dict[str, Any]:
            texts, seconds = ask_items(
                items, condition, backend, dimensions, seed=seed, progress=partial(progress, condition)
            )
            return {"texts": texts, "seconds": seconds}

        kept = run.unit(repr(condition), answer)
        progress(condition, len(items))
        answered, costs[condition] = read_replies(items, kept["texts"], condition, seed), kept["seconds"]
        keep(condition, answered)
        if condition.name == "prompt":
            prompted[condition.temperature] = answered
        opinions = judge.measure([answer.text for answer in answered]) if judge else None
        for axis in (*AXES, "all"):
            chosen = [index for index, item in enumerate(items) if axis in (item.axis, "all")]
            row = row_of(condition, axis, [answered[index] for index in chosen])
            baseline = prompted.get(condition.temperature)
            if baseline is not None and condition.name != "prompt":
                row["over_prompt"] = _difference(
                    [answered[index] for index in chosen], [baseline[index] for index in chosen]
                )
            if opinions is not None:
                row["second_opinion"] = _mean(
                    followed(float(opinions[items[index].axis][index]), items[index].wanted[items[index].axis])
                    for index in chosen
                )
            table.append(row)
    plain = next((cost for condition, cost in costs.items() if condition.name == "none"), None)
    for row, condition in zip(table, [condition for condition in costs for _ in (*AXES, "all")], strict=True):
        row["cost_ratio"] = round(costs[condition] / plain, 3) if plain else None
    return table


def combine_sharpened(views: Sequence[Tensor], parameters: Tensor) -> Combined:
    """(1 + ratio) z1 over the one view with the principle, its own nucleus: certainty without contrast."""
    (logits,) = views
    return Combined((1 + parameters[:, :1]) * logits, logits)


def row_of(condition: Condition, axis: str, answered: list[Answered]) -> dict[str, Any]:
    """A table's row of the replies on one axis, or on all, but for what compares it with other conditions."""
    hits = [float(answer.followed) for answer in answered]
    low, high = cluster_interval(hits, [answer.item.preference for answer in answered])
    return {
        "method": condition.name,
        "strength": condition.strength,
        "temperature": condition.temperature,
        "top_k": condition.top_k,
        "axis": axis,
        "n": len(answered),
        "preferences": len({answer.item.preference for answer in answered}),
        "followed": _mean(hits),
        "ci95": [round(low, 4), round(high, 4)],
        "toward": _mean(
            answer.measures[answer.item.axis] * answer.item.wanted[answer.item.axis] for answer in answered
        ),
        "relevance": _mean(answer.relevant for answer in answered),
        "helpfulness": _mean(answer.helpfulness for answer in answered),
        "repetition": _mean(answer.repeats for answer in answered),
        "off_axis": _mean(
            abs(answer.measures[other]) for answer in answered for other in AXES if other not in answer.asked
        ),
        "kinds": {kind: _mean(answer.followed for answer in answered if answer.item.kind == kind) for kind in KINDS},
        "later": _mean(answer.followed for answer in answered if answer.item.more),
    }


def _difference(answered: list[Answered], baseline: list[Answered]) -> dict[str, Any]:
    """How much more often the style is followed than under prompting, the same items compared pair by pair."""
    pairs = [float(ours.followed) - float(theirs.followed) for ours, theirs in zip(answered, baseline, strict=True)]
    low, high = cluster_interval(pairs, [answer.item.preference for answer in answered])
    return {"mean": _mean(pairs), "ci95": [round(low, 4), round(high, 4)]}


def _mean(values: Iterable[float]) -> float | None:
    """The mean to four digits; ``None`` of nothing."""
    kept = list(values)
    return round(sum(kept) / len(kept), 4) if kept else None


def _read(item: Item, text: str, asked: frozenset[str]) -> Answered:
    content = read_content(text, item.topic)
    return Answered(item, text, asked, measure(text), content.relevant, content.helpfulness, repeats(text))


def _applied(items: Sequence[Item], condition: Condition, seed: int) -> Sequence[Item]:
    """Whose preferences steer each item's reply."""
    return _shuffled(items, seed) if condition.name == "shuffled" else items


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """For each item another whose profile asks for nothing on any of its axes."""
    rng = random.Random(f"{seed}:shuffled")
    return [rng.choice([other for other in items if not set(other.wanted) & set(item.wanted)]) for item in items]


def replies_to(
    conversations: Sequence[Sequence[Message]],
    profiles: Sequence[Profile],
    condition: Condition,
    backend: Backend,
    dimensions: Dimensions,
    seed: int,
    progress: Callable[[int], None],
    *,
    principles: Sequence[str] | None = None,
) -> tuple[list[str], float, int]:
    """The replies' texts, the seconds they took together, and their tokens. ``principles`` are what steers them, where
    that is in words of its own and not the profiles'.
    """
    words = principles or [principle_text(profile, dimensions) for profile in profiles]
    chat = backend.chat
    many = int(condition.name.rpartition("-")[2]) if "best-of-" in condition.name else 1
    requests = [
        replace(request, sampling=replace(request.sampling, seed=seed + index * many + copy))
        for index, (messages, profile) in enumerate(zip(conversations, profiles, strict=True))
        for own in [principles[index] if principles else None]
        for request in [request_of(messages, profile, condition, backend, dimensions, principle=own)]
        for copy in range(many)
    ]
    started = time.perf_counter()
    said: list[list[int]] = []
    for request, (ids, ended) in zip(requests, said_to(requests, backend), strict=True):
        said.append([*ids, min(request.stop_ids)] if ended and many > 1 else ids)
        progress(len(said) // many)
    if many > 1:
        chosen = []
        for index, messages in enumerate(conversations):
            candidates = said[index * many : (index + 1) * many]
            if condition.is_pad:
                gains = _rewards(candidates, messages, words[index], backend)
            else:
                plan = _plan("linear", profiles[index], condition, dimensions, 1.0, words[index])
                gains = _gains(
                    candidates, [view.context for view in build_request(plan, messages, chat).views], backend
                )
            chosen.append(candidates[gains.index(max(gains))])
        said = chosen
    seconds, tokens = time.perf_counter() - started, sum(map(len, said))
    return [chat.tokenizer.decode(reply, skip_special_tokens=True) for reply in said], seconds, tokens


def said_to(requests: Iterable[Request], backend: Backend) -> Iterator[tuple[list[int], bool]]:
    """The replies' tokens, in the order of the requests, and whether each came to its end."""
    yield from decode_all(requests, backend.engine)


def request_of(
    messages: Sequence[Message],
    profile: Profile,
    condition: Condition,
    backend: Backend,
    dimensions: Dimensions,
    *,
    principle: str | None = None,
    opening: tuple[tuple[str, bool], ...] = (),
) -> Request:
    """What the engine is asked for under a condition, with seed 0; ``principle`` stands in for the profile's, and the
    reply is made to begin with ``opening``.
    """
    if condition.is_pad:
        return _pad_request(messages, profile, condition, backend, dimensions, principle, opening)
    method = {"sharpened": "prompt", "shuffled": "linear"}.get(condition.name, condition.name)
    method = "prompt" if method.startswith("best-of-") else method
    strength = condition.strength if STRENGTHS[method] else None
    plan = replace(_plan(method, profile, condition, dimensions, strength, principle), opening=opening)
    request = build_request(plan, messages, backend.chat)
    if condition.name == "sharpened":
        request = replace(request, combiner=combine_sharpened, parameters=(condition.strength or 0.0,))
    return request


def _pad_request(
    messages: Sequence[Message],
    profile: Profile,
    condition: Condition,
    backend: Backend,
    dimensions: Dimensions,
    principle: str | None,
    opening: tuple[tuple[str, bool], ...],
) -> Request:
    plan, guidance = _plan("pad", profile, condition, dimensions, condition.strength, principle), backend.guidance()
    sampling, _ = candidate_rule(replace(plan.sampling, top_k=condition.top_k), None, None)
    scale = None if condition.name == "pad-prefix" else guidance.scale(plan.principle)
    beta = 0.0 if "best-of-" in condition.name else plan.strength or 0.0
    preference = "" if condition.name == "pad-weights" else plan.principle
    return guidance.request(messages, preference, scale, beta, sampling, opening)


def _rewards(
    replies: Sequence[list[int]],
    messages: Sequence[Message],
    preference: str,
    backend: Backend,
) -> list[float]:
    """What the PersRM makes of each reply, nats; those that came to their end hold its token."""
    guidance = backend.guidance()
    ends = [bool(reply) and reply[-1] in backend.chat.stop_ids for reply in replies]
    said = [(reply[:-1] if end else reply, end) for reply, end in zip(replies, ends, strict=True)]
    return guidance.rewards(messages, preference, guidance.scale(preference), said, backend.engine)


def _plan(
    method: str,
    profile: Profile,
    condition: Condition,
    dimensions: Dimensions,
    strength: float | None,
    principle: str | None = None,
) -> Plan:
    sampling = Sampling(temperature=condition.temperature, top_p=TOP_P, top_k=None, max_tokens=MAX_TOKENS, seed=0)
    plan = make_plan(profile, dimensions, method, strength, sampling)
    return plan if principle is None or method == "drift" else replace(plan, principle=principle)


def _gains(replies: Sequence[list[int]], contexts: Sequence[Sequence[int]], backend: Backend) -> list[float]:
    """log p(reply | with) - log p(reply | without) of each reply, nats; the contexts are (without, with)."""
    read = backend.engine.log_probabilities([(context, reply) for reply in replies if reply for context in contexts])
    sums = iter([float(tokens.sum()) for tokens in read])
    return [-(next(sums) - next(sums)) if reply else -math.inf for reply in replies]
