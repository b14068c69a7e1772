"""Whole people as JSON, out of the database and into it: what ``users export``, ``dump`` and ``load`` carry.

One form for both ways. Everything but ``user`` may be left out of what is loaded, so that a file written by hand
(``{"user": "alice", "weights": {"humor": 0.5}}``) and a backup are read alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from sqlalchemy import Connection, Table, delete, insert, select
from sqlalchemy.exc import IntegrityError

from prefmw.errors import UnreadablePersonError, UsageError, UserExistsError
from prefmw.preferences import (
    Profile,
    Source,
    Weight,
    check_key,
    check_method,
    check_persona,
    check_text,
    check_user_id,
)
from prefmw.preferences.store import Existing, FeedbackKind
from prefmw.stores.rows import BESIDE, MOST_FLOAT32, chosen, flat, merged, ordered, packed, snapshot_of, unpacked
from prefmw.stores.schema import conversations, feedback, revisions, turns, users, vectors, weights

BATCH = 500
"""People whose rows are written together."""

T = TypeVar("T")


def _checked(check: Callable[[str], str]) -> AfterValidator:
    def validate(value: str) -> str:
        try:
            return check(value)
        except UsageError as error:
            raise ValueError(str(error)) from error

    return AfterValidator(validate)


def _storable_time(moment: datetime) -> datetime:
    if not 1900 <= moment.year <= 9000:
        raise ValueError("a time lies between the years 1900 and 9000")
    return moment


Text = Annotated[str, _checked(lambda text: check_text(text, "a text"))]
Key = Annotated[str, _checked(check_key)]
Unit = Annotated[float, Field(strict=True, ge=0, le=1)]
Signed = Annotated[float, Field(strict=True, ge=-1, le=1)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Time = Annotated[AwareDatetime, AfterValidator(_storable_time)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, protected_namespaces=())


class LayerRecord(_Strict):
    """One weight of one source."""

    dimension: Key
    source: Literal["inferred", "learned", "user", "admin"]
    value: Signed
    confidence: Unit = 1.0
    evidence: Any = None
    updated_at: Time | None = None


class RevisionRecord(_Strict):
    """One change of the profile."""

    number: Count
    actor: Text
    reason: Text
    change: dict[str, tuple[Any, Any]]
    snapshot: dict[str, Any]
    created_at: Time


class ToolsRecord(_Strict):
    """What a message has to do with tools: the calls it makes, as [name, arguments, id], and the one it answers."""

    calls: list[tuple[Text, Text, Text]]
    answers: Text


_Role = Literal["system", "user", "assistant", "tool"]


class TurnRecord(_Strict):
    """One exchange of a conversation; ``id`` is what feedback of the same person refers to."""

    id: int
    system: Text
    history: list[tuple[_Role, Text] | tuple[_Role, Text, ToolsRecord]]
    prompt: Text
    text: Text
    finish_reason: Annotated[Text, Field(max_length=16)]
    plan: dict[str, Any]
    plan_hash: Annotated[Text, Field(max_length=64)]
    method: Annotated[Text, Field(max_length=32)]
    strength: FiniteFloat | None
    revision: Count
    model: Text
    model_revision: Annotated[Text, Field(max_length=64)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    token_ids: list[int]
    input_tokens: Count
    output_tokens: Count
    replaces: int | None = None
    created_at: Time


class ConversationRecord(_Strict):
    """A conversation with its turns."""

    id: Annotated[Text, Field(min_length=1, max_length=32)]
    created_at: Time
    updated_at: Time
    turns: Annotated[list[TurnRecord], Field(min_length=1)]


class FeedbackRecord(_Strict):
    """One piece of feedback."""

    turn_id: int | None = None
    kind: FeedbackKind
    prompt: Text
    chosen: Text
    rejected: Text
    scores: dict[Key, tuple[FiniteFloat, FiniteFloat]] = {}
    created_at: Time


class VectorRecord(_Strict):
    """One vector."""

    kind: Annotated[Text, Field(max_length=32)]
    model: Annotated[Text, Field(max_length=255)]
    content: Annotated[Text, Field(max_length=64)]
    numbers: Annotated[list[Annotated[float, Field(ge=-MOST_FLOAT32, le=MOST_FLOAT32)]], Field(min_length=1)]
    created_at: Time


class Person(_Strict):
    """Everything held about one person."""

    user: Annotated[str, _checked(check_user_id)]
    persona: Annotated[str, _checked(check_persona)] = ""
    method: Annotated[str, _checked(check_method)] | None = None
    strengths: dict[str, Annotated[float, Field(strict=True)]] = {}
    revision: Annotated[int, Field(strict=True, ge=1, lt=2**31)] | None = None
    inferred_from: Annotated[Text, Field(max_length=64)] | None = None
    created_at: Time | None = None
    updated_at: Time | None = None
    weights: dict[Key, Signed] = {}
    layers: list[LayerRecord] = []
    revisions: list[RevisionRecord] = []
    conversations: list[ConversationRecord] = []
    feedback: list[FeedbackRecord] = []
    vectors: list[VectorRecord] = []

    def profile(self, now: datetime) -> Profile:
        """The profile that the record holds.

        Raises:
            UsageError: a layer or a turn's id stands twice, feedback is about a turn that is not there, the revisions
                do not end with the profile's own, or a strength is out of its method's range.
        """
        layers = [
            Weight(x.dimension, Source[x.source], x.value, x.confidence, x.updated_at or now, x.evidence)
            for x in self.layers
        ]
        layers += [Weight(dimension, Source.user, value, 1.0, now) for dimension, value in self.weights.items()]
        if len({(layer.dimension, layer.source) for layer in layers}) < len(layers):
            raise UsageError("a dimension has two weights of one source; keep one")
        turns_ids = [turn.id for talk in self.conversations for turn in talk.turns]
        if len(set(turns_ids)) < len(turns_ids):
            raise UsageError("two turns have the same id; number them anew")
        if strange := {one.turn_id for one in self.feedback} - {None, *turns_ids}:
            raise UsageError(f"feedback refers to turn {max(map(str, strange))}, which is not there")
        numbers = [revision.number for revision in self.revisions]
        if numbers != list(range(1, len(numbers) + 1)) or (numbers and self.revision not in (None, numbers[-1])):
            raise UsageError("the revisions do not count from 1 to the profile's own")
        if self.revision not in (None, 1) and not numbers:
            raise UsageError(f"revision {self.revision} without its history; leave 'revision' out to begin at 1")
        profile = Profile(
            user_id=self.user,
            persona=self.persona,
            revision=len(numbers),
            layers=ordered(layers),
            method=chosen(self.method),
            strengths=merged({}, dict(self.strengths)),
            inferred_from=self.inferred_from,
        )
        return replace(profile, revision=len(numbers) + self.is_new_to_its_history(profile))

    def is_new_to_its_history(self, profile: Profile) -> bool:
        """Whether the profile is not what the last revision says, so that loading it is a revision of its own."""
        if not self.revisions:
            return True
        last = self.revisions[-1].snapshot
        return flat(profile) != {name: value for name, value in last.items() if name not in BESIDE}


def export_person(connection: Connection, profile: Profile) -> dict[str, Any]:
    """Everything the database holds about the profile's person, ready for JSON."""

    def rows(table: Table, *order: str) -> list[dict[str, Any]]:
        query = select(table).where(table.c.user_id == profile.user_id).order_by(*order)
        return [_readable(row._asdict(), without="user_id") for row in connection.execute(query)]

    user = connection.execute(select(users).where(users.c.id == profile.user_id)).one()
    talks = {row["id"]: row | {"turns": []} for row in rows(conversations, "created_at", "id")}
    for turn in rows(turns, "id"):
        talks[turn.pop("conversation_id")]["turns"].append(turn)
    opinions = rows(feedback, "id")
    for opinion in opinions:
        del opinion["id"]
    numbers = rows(vectors, "kind", "model")
    for vector in numbers:
        vector["numbers"] = list(unpacked(vector["numbers"]))
    return {
        "user": profile.user_id,
        **_readable(user._asdict(), without="id"),
        "layers": rows(weights, "dimension", "source"),
        "revisions": rows(revisions, "number"),
        "conversations": list(talks.values()),
        "feedback": opinions,
        "vectors": numbers,
    }


def load_people(connection: Connection, people: Iterable[Mapping[str, Any]], existing: Existing, actor: str) -> int:
    """Write people in the caller's transaction and return how many were stored.

    Raises:
        UnreadablePersonError: one of them cannot be read.
        UsageError: a conversation's id is another user's.
        UserExistsError: a user is stored already, and that was to fail.
    """
    now, count, seen = datetime.now(UTC), 0, set[str]()

    def checked() -> Iterator[tuple[Person, Profile]]:
        rest = iter(people)
        for number in itertools.count(1):
            try:
                person = _person(next(rest))
                if person.user in seen:
                    raise UsageError(f"user '{person.user}' stands twice; keep one")
                seen.add(person.user)
                pair = person, person.profile(now)
            except StopIteration:
                return
            except UsageError as error:
                raise UnreadablePersonError(number, str(error)) from error
            except ValueError as error:  # of what reads them
                raise UnreadablePersonError(number, f"cannot be read: {error}") from error
            yield pair

    for batch in _batches(checked(), BATCH):
        ids = [person.user for person, _ in batch]
        taken = set(connection.execute(select(users.c.id).where(users.c.id.in_(ids))).scalars())
        if taken and existing == "fail":
            raise UserExistsError(f"user '{min(taken)}' is stored already; skip or replace those who are (--existing)")
        if existing == "replace" and taken:
            connection.execute(delete(users).where(users.c.id.in_(taken)))
        fresh = [pair for pair in batch if existing == "replace" or pair[0].user not in taken]
        _insert(connection, fresh, actor, now)
        count += len(fresh)
    return count


def _person(given: Mapping[str, Any]) -> Person:
    try:
        return Person.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise UsageError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error


def _insert(connection: Connection, people: list[tuple[Person, Profile]], actor: str, now: datetime) -> None:
    """Every row of these people, table by table; turns get new ids, which feedback follows."""
    rows: dict[Table, list[dict[str, Any]]] = {
        table: [] for table in (users, weights, revisions, conversations, vectors)
    }
    for person, profile in people:
        owner = {"user_id": profile.user_id}
        rows[users].append(
            {
                "id": profile.user_id,
                "persona": profile.persona,
                "method": profile.method,
                "strengths": profile.strengths,
                "revision": profile.revision,
                "inferred_from": profile.inferred_from,
                "created_at": person.created_at or now,
                "updated_at": person.updated_at or now,
            }
        )
        rows[weights] += [vars(layer) | owner | {"source": layer.source.name} for layer in profile.layers]
        rows[revisions] += [owner | one.model_dump() for one in person.revisions]
        if person.is_new_to_its_history(profile):
            last = person.revisions[-1].snapshot if person.revisions else {}
            change = {key: [last.get(key), value] for key, value in flat(profile).items() if value != last.get(key)}
            about = {"actor": check_text(actor, "an actor")[:128], "reason": "loaded", "created_at": now}
            rows[revisions].append(
                owner | about | {"number": profile.revision, "change": change, "snapshot": snapshot_of(profile)}
            )
        rows[conversations] += [owner | talk.model_dump(exclude={"turns"}) for talk in person.conversations]
        rows[vectors] += [owner | one.model_dump() | {"numbers": packed(one.numbers)} for one in person.vectors]
    for table, values in rows.items():
        if values:
            try:
                connection.execute(insert(table), values)
            except IntegrityError as error:
                raise UsageError(
                    "among the last people read, a revision, conversation or vector stands twice, or a conversation's "
                    "id is another user's"
                ) from error
    for person, profile in people:
        new_ids: dict[int | None, int | None] = {None: None}
        for talk in person.conversations:
            for turn in talk.turns:
                exchange = turn.model_dump(exclude={"id"}) | {"user_id": profile.user_id, "conversation_id": talk.id}
                exchange["replaces"] = new_ids.get(turn.replaces)
                statement = insert(turns).values(exchange).returning(turns.c.id)
                new_ids[turn.id] = connection.execute(statement).scalar_one()
        opinions = [one.model_dump() | {"user_id": profile.user_id} for one in person.feedback]
        for opinion in opinions:
            opinion["turn_id"] = new_ids.get(opinion["turn_id"])
        if opinions:
            connection.execute(insert(feedback), opinions)


def _readable(row: Mapping[str, Any], without: str) -> dict[str, Any]:
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in row.items()
        if name != without
    }


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
