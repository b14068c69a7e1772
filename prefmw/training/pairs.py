"""Preference pairs with the preference in words: read from the formats that preference data comes in.

A row is one of:

- conversational, as TRL has it: ``prompt``, ``chosen``, ``rejected`` as lists of {role, content}, or the last two with
  the prompt in them; and a ``preference``;
- plain: ``prompt``, ``chosen``, ``rejected``, ``preference`` as texts;
- an HH-RLHF dialogue: ``chosen`` and ``rejected`` as "\\n\\nHuman: ...\\n\\nAssistant: ..." that differ at last;
- scored replies: HelpSteer2's (``prompt``, ``response``, five scores; rows of one prompt are compared) or
  UltraFeedback's (``instruction``, ``completions`` with ratings). For every attribute, two replies of different scores
  are a pair (the PAD paper's Appendix A.2), whose preference names the attribute.

What is no pair (fields missing, empty, both replies equal) is counted by its reason and left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from prefmw.errors import UsageError
from prefmw.models.reward import HELPSTEER
from prefmw.preferences import Message
from prefmw.training.rows import read_rows

GENERAL = "Generate a response that is helpful and harmless."
"""The preference of HH-RLHF's dialogues, which name none, in the words of the paper's template."""

ATTRIBUTES = {
    "helpfulness": "helpful",
    "correctness": "correct",
    "coherence": "coherent",
    "complexity": "complex",
    "verbosity": "verbose",
    "instruction_following": "faithful to the instruction",
    "truthfulness": "truthful",
    "honesty": "honest",
}
"""Scored attributes, and the word that asks for each."""

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Pair:
    """Two replies to a conversation, one of them preferred by whoever has the ``preference``; ``group`` tells pairs
    apart in reports.
    """

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    preference: str
    group: str = ""


class _NotAPairError(Exception):
    """Why a row is left out."""


def read_pairs(paths: Iterable[Path], preference: str | None = None) -> tuple[list[Pair], Counter[str]]:
    """Every pair of files of JSON lines, a JSON list or Parquet (``.gz`` for the first two), and how many rows were
    left out, by reason. ``preference`` stands in for the one that rows do not name.

    Raises:
        UsageError: a file cannot be read, is of another kind, or no pair is left.
    """
    pairs: list[Pair] = []
    left_out: Counter[str] = Counter()
    scored: dict[str, list[tuple[str, Mapping[str, float]]]] = defaultdict(list)
    for path in paths:
        for row in read_rows(path, left_out):
            try:
                if "response" in row and "chosen" not in row:
                    prompt = _text(row, "prompt")
                    scored[prompt].append((_text(row, "response"), _scores(row, HELPSTEER)))
                elif "completions" in row:
                    pairs += _compared(_text(row, "instruction"), _rated(row), left_out)
                else:
                    pairs.append(_pair(row, preference))
            except _NotAPairError as reason:
                left_out[str(reason)] += 1
    for prompt, replies in scored.items():
        pairs += _compared(prompt, replies, left_out)
    if not pairs:
        told = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common()) or "no rows"
        raise UsageError(f"no pair is left to train on: {told}")
    return pairs, left_out


def _pair(row: Mapping[str, Any], preference: str | None) -> Pair:
    if "chosen" not in row or "rejected" not in row:
        raise _NotAPairError("without chosen, rejected or prompt")
    wanted = row.get("preference") or preference
    if isinstance(row["chosen"], list) or isinstance(row.get("prompt"), list):
        messages, chosen, rejected = _conversational(row)
    elif "prompt" not in row and isinstance(row["chosen"], str):
        messages, chosen, rejected = _dialogue(row)
        wanted = wanted or GENERAL
    else:
        messages = (Message("user", _text(row, "prompt")),)
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if not isinstance(wanted, str) or not wanted.strip():
        raise _NotAPairError("without a preference (name one for all with --preference)")
    return _checked(messages, chosen, rejected, wanted)


def _checked(messages: tuple[Message, ...], chosen: str, rejected: str, preference: str) -> Pair:
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        raise _NotAPairError("with an empty prompt")
    if not chosen.strip() or not rejected.strip():
        raise _NotAPairError("with an empty reply")
    if chosen.strip() == rejected.strip():
        raise _NotAPairError("with two equal replies")
    return Pair(messages, chosen.strip(), rejected.strip(), preference.strip())


def _conversational(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    chosen, rejected = _messages(row["chosen"]), _messages(row["rejected"])
    if "prompt" in row:
        prompt = _messages(row["prompt"])
    else:
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    if len(chosen) != 1 or len(rejected) != 1 or {chosen[0].role, rejected[0].role} != {"assistant"}:
        raise _NotAPairError("whose replies are not one message of the assistant each")
    return prompt, chosen[0].content, rejected[0].content


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", value),)
    try:
        found = tuple(Message(one["role"], one["content"]) for one in value)
    except (TypeError, KeyError) as error:
        raise _NotAPairError("with a message that has no role or content") from error
    if any(one.role not in _ROLES or not isinstance(one.content, str) for one in found):
        raise _NotAPairError("with a message of another role, or without text")
    return found


def _dialogue(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    chosen, rejected = _turns(_text(row, "chosen")), _turns(_text(row, "rejected"))
    if chosen[:-1] != rejected[:-1] or {chosen[-1].role, rejected[-1].role} != {"assistant"}:
        raise _NotAPairError("whose dialogues differ before the last reply")
    return tuple(chosen[:-1]), chosen[-1].content, rejected[-1].content


def _turns(dialogue: str) -> list[Message]:
    """An HH-RLHF dialogue's turns."""
    turns: list[Message] = []
    for part in f"\n\n{dialogue.lstrip()}".split("\n\nHuman:")[1:]:
        said, *replies = part.split("\n\nAssistant:")
        turns.append(Message("user", said.strip()))
        turns += [Message("assistant", reply.strip()) for reply in replies]
    if not turns:
        raise _NotAPairError("that are no dialogue of Human and Assistant")
    return turns


def _scores(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    found = {}
    for name in names:
        try:
            found[name] = float(row[name])
        except (KeyError, TypeError, ValueError):
            continue
    if not found:
        raise _NotAPairError("without scores")
    return found


def _rated(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """UltraFeedback's completions with their ratings."""
    found: list[tuple[str, Mapping[str, float]]] = []
    completions = row["completions"]
    for one in completions if isinstance(completions, list) else []:
        if not isinstance(one, dict) or not isinstance(one.get("annotations"), dict):
            continue
        ratings = {name: table.get("Rating") for name, table in one["annotations"].items() if isinstance(table, dict)}
        found.append((_text(one, "response"), _scores(ratings, set(ratings) & set(ATTRIBUTES))))
    if len(found) < 2:
        raise _NotAPairError("without two scored replies")
    return found


def _compared(prompt: str, replies: list[tuple[str, Mapping[str, float]]], left_out: Counter[str]) -> Iterator[Pair]:
    """The pairs of one prompt's scored replies, attribute by attribute."""
    if len(replies) < 2:
        left_out["without another reply to compare with"] += 1
    for (one, ones), (other, others) in combinations(replies, 2):
        for name in sorted(set(ones) & set(others)):
            if ones[name] == others[name]:
                left_out["with equal scores"] += 1
                continue
            chosen, rejected = (one, other) if ones[name] > others[name] else (other, one)
            try:
                preference = f"Generate a response that is {ATTRIBUTES[name]}."
                yield _checked((Message("user", prompt),), chosen, rejected, preference)
            except _NotAPairError as reason:
                left_out[str(reason)] += 1


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _NotAPairError("without chosen, rejected or prompt")
    return value
