"""Whole people as JSON, out of the database and into it: what ``users export``, ``dump`` and ``load`` carry.

One form for both ways. Everything but ``user`` may be left out of what is loaded, so that a file written by hand
(``{"user": "alice", "weights": {"humor": 0.5}}``) and a backup are read alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from sqlalchemy import Connection, Table, delete, insert, select
from sqlalchemy.exc import IntegrityError

from prefmw.errors import UsageError, UserExistsError
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
from prefmw.stores.rows import flat, merged, ordered, packed, snapshot_of, unpacked
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


Text = Annotated[str, _checked(lambda text: check_text(text, "a text"))]
Unit = Annotated[float, Field(ge=0, le=1)]
Signed = Annotated[float, Field(ge=-1, le=1)]
Key = Annotated[str, _checked(check_key)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, protected_namespaces=())


class LayerRecord(_Strict):
    """One weight of one source."""

    dimension: Key
    source: Literal["inferred", "learned", "user", "admin"]
    value: Signed
    confidence: Unit = 1.0
    evidence: Any = None
    updated_at: AwareDatetime | None = None


class RevisionRecord(_Strict):
    """One change of the profile."""

    number: int = Field(ge=1)
    actor: Text
    reason: Text
    change: dict[str, Any]
    snapshot: dict[str, Any]
    created_at: AwareDatetime


class TurnRecord(_Strict):
    """One exchange of a conversation; ``id`` is what feedback of the same person refers to."""

    id: int
    system: Text
    history: list[tuple[Literal["system", "user", "assistant"], Text]]
    prompt: Text
    text: Text
    finish_reason: Annotated[Text, Field(max_length=16)]
    plan: dict[str, Any]
    plan_hash: Annotated[Text, Field(max_length=64)]
    method: Annotated[Text, Field(max_length=32)]
    strength: FiniteFloat | None
    revision: int
    model: Text
    model_revision: Annotated[Text, Field(max_length=64)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    token_ids: list[int]
    input_tokens: int
    output_tokens: int
    replaces: int | None = None
    created_at: AwareDatetime


class ConversationRecord(_Strict):
    """A conversation with its turns."""

    id: Annotated[Text, Field(min_length=1, max_length=32)]
    created_at: AwareDatetime
    updated_at: AwareDatetime
    turns: list[TurnRecord]


class FeedbackRecord(_Strict):
    """One piece of feedback."""

    turn_id: int | None = None
    kind: FeedbackKind
    prompt: Text
    chosen: Text
    rejected: Text
    scores: dict[Key, tuple[FiniteFloat, FiniteFloat]] = {}
    created_at: AwareDatetime


class VectorRecord(_Strict):
    """One vector."""

    kind: Annotated[Text, Field(max_length=32)]
    model: Annotated[Text, Field(max_length=255)]
    content: Annotated[Text, Field(max_length=64)]
    numbers: list[FiniteFloat]
    created_at: AwareDatetime


class Person(_Strict):
    """Everything held about one person."""

    user: Annotated[str, _checked(check_user_id)]
    persona: Annotated[str, _checked(check_persona)] = ""
    method: Annotated[str, _checked(check_method)] | None = None
    strengths: dict[str, float] = {}
    revision: int | None = Field(default=None, ge=1)
    inferred_from: Annotated[Text, Field(max_length=64)] | None = None
    created_at: AwareDatetime | None = None
    updated_at: AwareDatetime | None = None
    weights: dict[Key, Signed] = {}
    layers: list[LayerRecord] = []
    revisions: list[RevisionRecord] = []
    conversations: list[ConversationRecord] = []
    feedback: list[FeedbackRecord] = []
    vectors: list[VectorRecord] = []

    def profile(self, now: datetime) -> Profile:
        """The profile that the record holds.

        Raises:
            UsageError: a layer stands twice, the revisions do not end with the profile's own, or a strength is out of
                its method's range.
        """
        layers = [
            Weight(x.dimension, Source[x.source], x.value, x.confidence, x.updated_at or now, x.evidence)
            for x in self.layers
        ]
        layers += [Weight(dimension, Source.user, value, 1.0, now) for dimension, value in self.weights.items()]
        if len({(layer.dimension, layer.source) for layer in layers}) < len(layers):
            raise UsageError("a dimension has two weights of one source; keep one")
        numbers = [revision.number for revision in self.revisions]
        if numbers != list(range(1, len(numbers) + 1)) or (numbers and self.revision not in (None, numbers[-1])):
            raise UsageError("the revisions do not count from 1 to the profile's own")
        if self.revision not in (None, 1) and not numbers:
            raise UsageError(f"revision {self.revision} without its history; leave 'revision' out to begin at 1")
        return Profile(
            user_id=self.user,
            persona=self.persona,
            revision=len(numbers) or 1,
            layers=ordered(layers),
            method=self.method,
            strengths=merged({}, dict(self.strengths)),
            inferred_from=self.inferred_from,
        )


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
        UsageError: one of them cannot be read; the iterable stands at it.
        UserExistsError: a user is stored already, and that was to fail.
    """
    now, count, seen = datetime.now(UTC), 0, set[str]()

    def checked() -> Iterator[tuple[Person, Profile]]:
        for given in people:
            person = _person(given)
            if person.user in seen:
                raise UsageError(f"user '{person.user}' stands twice; keep one")
            seen.add(person.user)
            yield person, person.profile(now)

    for batch in _batches(checked(), BATCH):
        ids = [person.user for person, _ in batch]
        taken = set(connection.execute(select(users.c.id).where(users.c.id.in_(ids))).scalars())
        if taken and existing == "fail":
            raise UserExistsError(
                f"user '{min(taken)}' is stored already; nobody was loaded. Skip or replace those who are"
            )
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
        first = {"number": 1, "actor": actor[:128], "reason": "loaded", "snapshot": snapshot_of(profile)}
        change = {key: [None, value] for key, value in flat(profile).items() if value not in (None, "")}
        history = [revision.model_dump() for revision in person.revisions]
        rows[revisions] += [owner | one for one in history or [first | {"change": change, "created_at": now}]]
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
        new_ids: dict[int, int] = {}
        for talk in person.conversations:
            for turn in talk.turns:
                exchange = turn.model_dump(exclude={"id"}) | {"user_id": profile.user_id, "conversation_id": talk.id}
                exchange["replaces"] = new_ids.get(turn.replaces) if turn.replaces is not None else None
                statement = insert(turns).values(exchange).returning(turns.c.id)
                new_ids[turn.id] = connection.execute(statement).scalar_one()
        opinions = [one.model_dump() | {"user_id": profile.user_id} for one in person.feedback]
        for opinion in opinions:
            turn_id = opinion["turn_id"]
            if turn_id is not None and turn_id not in new_ids:
                raise UsageError(f"user '{profile.user_id}': feedback refers to turn {turn_id}, which is not there")
            opinion["turn_id"] = None if turn_id is None else new_ids[turn_id]
        if opinions:
            connection.execute(insert(feedback), opinions)


def _readable(row: Mapping[str, Any], without: str) -> dict[str, Any]:
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in row.items()
        if name != without
    }


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch
