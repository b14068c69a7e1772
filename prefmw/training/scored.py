"""Replies with scores, for a reward model: read from the formats that such data comes in.

A row is one of:

- plain: ``prompt`` (a text, or messages as lists of {role, content}), ``response``, ``scores`` {attribute: 0-100};
- HelpSteer's and HelpSteer2's: ``prompt``, ``response``, five labels from 0 to 4, of which x becomes 20 x + 10;
- UltraFeedback's: ``instruction``, ``completions`` with ratings from 1 to 5, of which x becomes 20 x - 10, and an
  ``overall_score`` from 1 to 10, times 10.

Outputs of the last two are named as the released reward model's are. A score that is missing is no label; one out of
its range is an error, since a file on another scale would teach nonsense.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefmw.errors import UsageError
from prefmw.models.reward import HELPSTEER
from prefmw.preferences import Message
from prefmw.training.rows import read_rows

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Scored:
    """A reply to a conversation, and what is known of its scores, 0-100."""

    messages: tuple[Message, ...]
    response: str
    scores: Mapping[str, float] = field(default_factory=dict)


class _NotScoredError(Exception):
    """Why a row is left out."""


def read_scored(paths: Iterable[Path], *, scores: bool = True) -> tuple[list[Scored], Counter[str]]:
    """Every scored reply of some files, and how many rows were left out, by reason. Without ``scores`` replies that
    have none are taken too.

    Raises:
        UsageError: a file cannot be read, a score is out of range, or no row is left.
    """
    found: list[Scored] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        for number, row in enumerate(read_rows(path, left_out), start=1):
            try:
                for one in _of_row(row):
                    if scores and not one.scores:
                        left_out["without any score"] += 1
                    else:
                        found.append(one)
            except _NotScoredError as reason:
                left_out[str(reason)] += 1
            except UsageError as error:
                raise UsageError(f"row {number} of '{path.name}': {error}") from error
    if not found:
        told = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common()) or "no rows"
        raise UsageError(f"no reply is left to learn from: {told}")
    return found, left_out


def _of_row(row: Mapping[str, Any]) -> Iterator[Scored]:
    if "completions" in row:
        completions = row["completions"]
        prompt = _prompt(row.get("instruction"))
        for one in completions if isinstance(completions, list) else []:
            if isinstance(one, dict):
                yield Scored(prompt, _reply(one.get("response")), dict(_ultrafeedback(one)))
        return
    prompt, reply = _prompt(row.get("prompt")), _reply(row.get("response"))
    if "scores" in row:
        if not isinstance(row["scores"], dict):
            raise _NotScoredError("whose scores are no table")
        yield Scored(prompt, reply, dict(_plain(row["scores"])))
    else:
        yield Scored(prompt, reply, dict(_helpsteer(row)))


def _prompt(value: Any) -> tuple[Message, ...]:
    messages: tuple[Message, ...]
    if isinstance(value, str):
        messages = (Message("user", value),)
    else:
        try:
            messages = tuple(Message(one["role"], one["content"]) for one in value)
        except (TypeError, KeyError) as error:
            raise _NotScoredError("without a prompt") from error
        if any(one.role not in _ROLES or not isinstance(one.content, str) for one in messages):
            raise _NotScoredError("with a message of another role, or without text")
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        raise _NotScoredError("with an empty prompt")
    return messages


def _reply(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _NotScoredError("with an empty reply")
    return value.strip()


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if not math.isnan(number) else None


def _within(name: str, value: Any, low: float, high: float) -> float | None:
    number = _number(value)
    if number is not None and not low <= number <= high:
        raise UsageError(f"the score '{str(name)[:40]}' lies in [{low:g}, {high:g}], got {number:g}")
    return number


def _plain(table: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in table.items():
        if (number := _within(name, value, 0, 100)) is not None:
            yield name, number


def _helpsteer(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in HELPSTEER:
        if (number := _within(name, row.get(name), 0, 4)) is not None:
            yield f"helpsteer-{name}", 20 * number + 10


def _ultrafeedback(one: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    annotations = one.get("annotations")
    for name, table in annotations.items() if isinstance(annotations, dict) else ():
        rating = table.get("Rating") if isinstance(table, dict) else None
        if (number := _within(name, rating, 1, 5)) is not None:
            yield f"ultrafeedback-{name}", 20 * number - 10
    if (number := _within("overall_score", one.get("overall_score"), 1, 10)) is not None:
        yield "ultrafeedback-overall_score", 10 * number
