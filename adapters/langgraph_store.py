"""A person's preferences as LangGraph's long-term memory, so that nodes and tools reach them the usual way.

::

    graph = builder.compile(store=PreferenceView(rest=InMemoryStore()))
    # in a node
    store.get(namespace_of("alice"), "humor").value["value"]
    store.put(namespace_of("alice"), "humor", {"value": 0.5})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prefmw.adapters.awaiting import in_thread
from prefmw.adapters.opening import Opened, opened
from prefmw.bootstrap import load_dimensions
from prefmw.errors import MissingExtraError, UnknownUserError, UsageError
from prefmw.preferences import Dimensions, Profile, Source, Stated, Weight, check_user_id

try:
    from langgraph.store.base import (
        BaseStore,
        GetOp,
        Item,
        ListNamespacesOp,
        MatchCondition,
        Op,
        PutOp,
        Result,
        SearchItem,
        SearchOp,
    )
except ModuleNotFoundError as error:
    raise MissingExtraError("PreferenceView", "agents") from error

NAMESPACE = "preferences"
"""What the namespace of a person's preferences begins with."""

PERSONA = "persona"
"""The key of what a person says of themselves; every other key is a dimension."""

_COMPARE = {
    "$eq": lambda found, asked: found == asked,
    "$ne": lambda found, asked: found != asked,
    "$gt": lambda found, asked: found > asked,
    "$gte": lambda found, asked: found >= asked,
    "$lt": lambda found, asked: found < asked,
    "$lte": lambda found, asked: found <= asked,
}


def namespace_of(user_id: str) -> tuple[str, ...]:
    """Where a person's preferences lie: ("preferences", "alice"); periods, which no label may hold, part labels."""
    return (NAMESPACE, *check_user_id(user_id).split("."))


class PreferenceView(BaseStore):
    """The preferences of prefmw's store in LangGraph's terms.

    :func:`namespace_of` a user holds an item for every set dimension, ``{"value": 0.5, "source": "user", "confidence":
    1.0, "pole": "humorous"}``, and ``persona``, ``{"text": ...}``, where there is one. Writing makes a revision of the
    profile, of source ``user``; deleting takes that source's weight away, which uncovers what lies beneath. Every call
    names its user, so none reads across people. All other namespaces are ``rest``'s.

    Args:
        database: SQLAlchemy URL or SQLite file of the preferences; by default the one that the settings name.
        rest: the store of everything else; without it other namespaces are an error.
    """

    def __init__(self, *, database: str | None = None, rest: BaseStore | None = None) -> None:
        self._database = database
        self._rest = rest
        self._work: tuple[Opened, Dimensions] | None = None

    @property
    def supports_ttl(self) -> bool:  # type: ignore[override]
        """Whether ``rest`` lets items expire; preferences do not."""
        return self._rest is not None and self._rest.supports_ttl

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Do these operations, in their order."""
        return [self._rest_of(op).batch([op])[0] if self._is_rest(op) else self._do(op) for op in ops]

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """As :meth:`batch`."""
        results: list[Result] = []
        for op in ops:
            if self._is_rest(op):
                results += await self._rest_of(op).abatch([op])
            else:
                results.append(await in_thread(partial(self._do, op)))
        return results

    def _is_rest(self, op: Op) -> bool:
        return _prefix(op)[:1] != (NAMESPACE,)

    def _rest_of(self, op: Op) -> BaseStore:
        if self._rest is None:
            raise UsageError(
                f"PreferenceView holds the namespaces ('{NAMESPACE}', USER ID) alone; give it the store of everything "
                "else: PreferenceView(rest=...)"
            )
        return self._rest

    def _do(self, op: Op) -> Result:
        match op:
            case GetOp():
                found = self._items(self._user(op.namespace))
                return next((item for item in found if item.key == op.key), None)
            case SearchOp():
                return self._search(op)
            case ListNamespacesOp():
                return self._namespaces(op)
            case PutOp():
                self._put(op)
                return None
        raise UsageError(f"PreferenceView knows no {type(op).__name__}")

    def _user(self, namespace: tuple[str, ...]) -> str:
        if len(namespace) < 2 or "*" in namespace:
            raise UsageError(f"whose preferences? a namespace is ('{NAMESPACE}', USER ID), and names one user")
        return ".".join(namespace[1:])

    def _items(self, user_id: str) -> list[Item]:
        """All there is of a person; nothing of one whom the store does not know."""
        work, dimensions = self._open()
        try:
            profile = work.store.profile(user_id)
        except UnknownUserError:
            return []
        weights = [self._item(profile, weight, dimensions) for weight in profile.weights.values()]
        return [*self._persona(profile), *weights]

    def _item(self, profile: Profile, weight: Weight, dimensions: Dimensions) -> Item:
        known = dimensions.get(weight.dimension)
        value = weight.as_json() | ({"pole": known.pole(weight.value).name} if known and weight.value else {})
        return Item(
            value=value,
            key=weight.dimension,
            namespace=namespace_of(profile.user_id),
            created_at=weight.updated_at,
            updated_at=weight.updated_at,
        )

    def _persona(self, profile: Profile) -> list[Item]:
        if not profile.persona:
            return []
        revisions = self._open()[0].store.revisions(profile.user_id)
        changed = [one.created_at for one in revisions if "persona" in one.change] or [datetime.now(UTC)]
        return [
            Item(
                value={"text": profile.persona},
                key=PERSONA,
                namespace=namespace_of(profile.user_id),
                created_at=changed[0],
                updated_at=changed[-1],
            )
        ]

    def _search(self, op: SearchOp) -> list[SearchItem]:
        """A person's items that pass the filter; with a query those come first that share most words with it."""
        items = [item for item in self._items(self._user(op.namespace_prefix)) if _passes(item, op.filter or {})]
        scores = [self._shared(item, op.query) if op.query else None for item in items]
        ranked = sorted(zip(scores, items, strict=True), key=lambda pair: -(pair[0] or 0.0))
        return [
            SearchItem(
                namespace=item.namespace,
                key=item.key,
                value=item.value,
                created_at=item.created_at,
                updated_at=item.updated_at,
                score=score,
            )
            for score, item in ranked[op.offset : op.offset + op.limit]
        ]

    def _shared(self, item: Item, query: str) -> float:
        """The share of the query's words that stand in an item, the sentences of its dimension's poles included."""
        known = self._open()[1].get(item.key)
        poles = [pole for pole in (known.negative, known.positive) if pole] if known else []
        texts = [item.key, str(item.value.get("text", "")), *(f"{pole.name} {pole.principle}" for pole in poles)]
        asked, there = _words(query), _words(" ".join(texts))
        return len(asked & there) / len(asked) if asked else 0.0

    def _namespaces(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        """The one namespace that the prefix names, if there is anything in it."""
        prefix = _prefix(op)
        if not self._items(self._user(prefix)):
            return []
        fits = all(_matches(condition, prefix) for condition in op.match_conditions or ())
        return [prefix[: op.max_depth]][op.offset : op.offset + op.limit] if fits else []

    def _put(self, op: PutOp) -> None:
        if op.ttl is not None:
            raise UsageError("a preference does not expire; write it without ttl")
        work, dimensions = self._open()
        user_id = self._user(op.namespace)
        written: dict[str, Any] = {"actor": "langgraph", "reason": "written through LangGraph's store"}
        if op.value is None and not any(item.key == op.key for item in self._items(user_id)):
            return
        if op.key == PERSONA:
            persona = "" if op.value is None else _field(op.value, "text", str)
            work.profile(user_id, "create", "written through LangGraph's store")
            work.store.edit_user(user_id, persona=persona, **written)
            return
        stated = None
        if op.value is not None:
            stated = Stated(dimensions.named(op.key).check(_field(op.value, "value", int | float)))
            work.profile(user_id, "create", "written through LangGraph's store")
        work.store.write_weights(user_id, {op.key: stated}, source=Source.user, **written)

    def _open(self) -> tuple[Opened, Dimensions]:
        if self._work is None:
            work = opened(database=self._database)
            self._work = work, load_dimensions(work.settings)
        return self._work


def _prefix(op: Op) -> tuple[str, ...]:
    """The namespace that an operation is about, or what it begins with."""
    match op:
        case GetOp() | PutOp():
            return op.namespace
        case SearchOp():
            return op.namespace_prefix
        case ListNamespacesOp():
            prefixes = [one.path for one in op.match_conditions or () if one.match_type == "prefix"]
            return tuple(prefixes[0]) if prefixes else ()
    raise UsageError(f"PreferenceView knows no {type(op).__name__}")


def _matches(condition: MatchCondition, namespace: tuple[str, ...]) -> bool:
    path = tuple(condition.path)
    part = namespace[: len(path)] if condition.match_type == "prefix" else namespace[-len(path) :]
    return len(part) == len(path) and all(asked in ("*", found) for asked, found in zip(path, part, strict=True))


def _passes(item: Item, conditions: Mapping[str, Any]) -> bool:
    for name, asked in conditions.items():
        found = item.value.get(name)
        tests = asked if isinstance(asked, dict) and any(key.startswith("$") for key in asked) else {"$eq": asked}
        for operator, value in tests.items():
            if operator not in _COMPARE:
                raise UsageError(f"a filter compares by {', '.join(_COMPARE)}, got '{str(operator)[:20]}'")
            try:
                if not _COMPARE[operator](found, value):
                    return False
            except TypeError:  # nothing there, or of another type
                return False
    return True


def _field(value: Mapping[str, Any], name: str, kind: Any) -> Any:
    """What is written of an item; the rest of one that was read may stand beside it and is not written."""
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, kind) or isinstance(found, bool) or set(value) - {name, "source", "confidence", "pole"}:
        raise UsageError(f"this preference is written as {{'{name}': ...}}, a {'text' if kind is str else 'number'}")
    return found


def _words(text: str) -> set[str]:
    """The words of a text, in lower case and without a plural's s."""
    return {word.removesuffix("s") for word in "".join(c if c.isalnum() else " " for c in text.lower()).split()}
