"""Rows of the tables as the core's dataclasses, and back: no query is made here."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from prefmw.errors import StoreError, UsageError
from prefmw.preferences import (
    AUTO,
    Message,
    Profile,
    RecordedFeedback,
    RecordedTurn,
    Source,
    Stated,
    ToolCall,
    Weight,
    check_key,
    check_method,
    check_persona,
    check_stated,
    check_strength,
)


def profile_of(rows: Sequence[Row[*tuple[Any, ...]]]) -> Profile:
    """One profile from its rows, one for each layer (a single row with empty layer columns where there is none).

    Raises:
        StoreError: a layer's source is none that this version knows.
    """
    for row in rows:
        if row.source is not None and row.source not in Source.__members__:
            raise StoreError(f"user '{row.id}' has a weight of the unknown source '{row.source}'; upgrade prefmw")
    layers = [
        Weight(row.dimension, Source[row.source], row.value, row.confidence, row.updated_at, row.evidence)
        for row in rows
        if row.dimension is not None
    ]
    first = rows[0]
    return Profile(
        user_id=first.id,
        persona=first.persona,
        revision=first.revision,
        layers=ordered(layers),
        method=first.method,
        strengths=first.strengths,
        inferred_from=first.inferred_from,
    )


def turn_of(row: Row[Any]) -> RecordedTurn:
    """A turn from its row."""
    values = dict(row._mapping)
    del values["output_tokens"]  # the number of token ids
    values["token_ids"] = tuple(row.token_ids)
    values["history"] = tuple(message_of(said) for said in row.history)
    return RecordedTurn(**values)


def message_row(message: Message) -> list[Any]:
    """A message as JSON: [role, content], and with tools a third, {"calls": [[name, arguments, id]], "answers": id}."""
    plain = [message.role, message.content]
    if not (message.calls or message.answers):
        return plain
    return [*plain, {"calls": [list(call) for call in message.calls], "answers": message.answers}]


def message_of(row: Sequence[Any]) -> Message:
    """The message that :func:`message_row` was given."""
    role, content, *rest = row
    tools = rest[0] if rest else {}
    calls = tuple(ToolCall(*call) for call in tools.get("calls", ()))
    return Message(role, content, calls, tools.get("answers", ""))


def feedback_of(row: Row[Any]) -> RecordedFeedback:
    """Feedback from its row."""
    scores = {dimension: (chosen, rejected) for dimension, (chosen, rejected) in row.scores.items()}
    return RecordedFeedback(**{**row._mapping, "scores": scores})


def ordered(layers: Iterable[Weight]) -> tuple[Weight, ...]:
    """Layers in the one order that profiles hold them in."""
    return tuple(sorted(layers, key=lambda layer: (layer.dimension, layer.source)))


def flat(profile: Profile) -> dict[str, Any]:
    """A profile as ``{field: value}`` in JSON: ``persona``, ``method``, ``strength.METHOD``, ``weight.DIM.SOURCE``. A
    weight is [value, confidence], and what it rests on as a third where it rests on something.
    """
    return {
        "persona": profile.persona,
        "method": profile.method,
        **{f"strength.{method}": value for method, value in profile.strengths.items()},
        **{_layer_key(layer): _layer_value(layer) for layer in profile.layers},
    }


BESIDE = ("updated_at", "inferred_from")
"""What a revision's snapshot holds beside :func:`flat`."""


def snapshot_of(profile: Profile) -> dict[str, Any]:
    """A whole profile as JSON, for its revision."""
    return flat(profile) | {
        "updated_at": {_layer_key(layer): layer.updated_at.isoformat() for layer in profile.layers},
        "inferred_from": profile.inferred_from,
    }


def profile_from_snapshot(user_id: str, number: int, snapshot: dict[str, Any]) -> Profile:
    """The profile of revision ``number`` that :func:`snapshot_of` was given.

    Raises:
        UsageError: it holds a persona, a method or a weight that this version does not take.
    """
    strengths: dict[str, float | None] = {}
    layers: list[Weight] = []
    try:
        for name, value in snapshot.items():
            kind, _, rest = name.partition(".")
            if kind == "strength":
                strengths[rest] = value
            elif kind == "weight":
                dimension, _, source = rest.rpartition(".")
                moment = datetime.fromisoformat(snapshot["updated_at"][name])
                stated = check_stated(Stated(*value))
                layers.append(Weight(check_key(dimension), Source[source], stated[0], stated[1], moment, stated[2]))
        return Profile(
            user_id=user_id,
            persona=check_persona(snapshot["persona"]),
            revision=number,
            layers=ordered(layers),
            method=chosen(snapshot["method"]),
            strengths=merged({}, strengths),
            inferred_from=snapshot.get("inferred_from"),
        )
    except (AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise UsageError(f"revision {number} holds what this version of prefmw does not take: {error}") from error


def chosen(method: str | None) -> str | None:
    """The method that a user chose; ``auto`` is none."""
    return None if method is None or check_method(method) == AUTO else method


def merged(strengths: dict[str, float], changes: dict[str, float | None]) -> dict[str, float]:
    """The strengths after the changes, each of which is within its method's range; ``None`` forgets one."""
    for method, strength in changes.items():
        if strength is not None:
            check_strength(check_method(method), strength)
    return {method: strength for method, strength in {**strengths, **changes}.items() if strength is not None}


def storable(text: str) -> str:
    """Text that both databases hold: PostgreSQL takes no NUL, which a model may emit."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


MOST_FLOAT32 = 3.4e38
"""The largest size of a number in a vector."""


def packed(numbers: Sequence[float]) -> bytes:
    """Numbers as float32, little-endian."""
    return struct.pack(f"<{len(numbers)}f", *numbers)


def unpacked(stored: bytes) -> tuple[float, ...]:
    """What :func:`packed` was given, in float32."""
    return struct.unpack(f"<{len(stored) // 4}f", stored)


def _layer_value(layer: Weight) -> list[Any]:
    return [layer.value, layer.confidence, *([] if layer.evidence is None else [layer.evidence])]


def _layer_key(layer: Weight) -> str:
    return f"weight.{layer.dimension}.{layer.source.name}"
