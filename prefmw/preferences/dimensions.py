"""The registry of dimensions: what a preference can be set on. Its content is data: ``dimensions.toml``, and what a
deployment adds to it, replaces or retires in a file of the same form.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from prefmw.errors import UsageError, nearest
from prefmw.preferences.profile import check_key

Kind = Literal["style", "quality"]


@dataclass(frozen=True)
class Pole:
    """One end of a dimension.

    Attributes:
        name: as people see it.
        principle: the sentence that asks a model for it.
        anchors: statements of people who want it, for a read-out to be fitted on (the shipped dimensions' stand in
            ``anchors.toml``).
        wordings: other sentences that ask for it; a model's calibration may put one of them in the principle's place.
        midpoint: how far half a weight on this side goes towards the sentence's reading as one of Drift's dials, in
            (0, 1).
    """

    name: str
    principle: str
    anchors: tuple[str, ...] = ()
    wordings: tuple[str, ...] = ()
    midpoint: float = 0.5


@dataclass(frozen=True)
class Dimension:
    """A signed axis in [-1, 1]; one without a negative pole runs over [0, 1]."""

    key: str
    kind: Kind
    positive: Pole
    negative: Pole | None = None

    @property
    def low(self) -> float:
        """The least weight the dimension takes: -1, or 0 where it has no negative pole."""
        return -1.0 if self.negative else 0.0

    @property
    def poles(self) -> tuple[str | None, str]:
        """The names of the negative and the positive pole."""
        return (self.negative.name if self.negative else None, self.positive.name)

    def pole(self, weight: float) -> Pole:
        """The pole on the side of ``weight``'s sign; zero counts as positive."""
        return self.negative if weight < 0 and self.negative else self.positive

    def check(self, value: float) -> float:
        """Return ``value`` if it is a weight for this dimension.

        Raises:
            UsageError: not finite, or outside [low, 1].
        """
        if not self.low <= value <= 1:  # NaN is in no range
            raise UsageError(f"a weight for {self.key} lies in [{self.low:g}, 1], got {str(value)[:20]}")
        return value


class Dimensions(Mapping[str, Dimension]):
    """Dimensions by key, in the registry's order; an unknown key is an error that suggests the nearest."""

    def __init__(self, dimensions: list[Dimension]) -> None:
        self._by_key = {dimension.key: dimension for dimension in dimensions}

    def __getitem__(self, key: str) -> Dimension:
        return self._by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def named(self, key: str) -> Dimension:
        """The dimension called ``key``.

        Raises:
            UsageError: there is none; the message suggests the nearest.
        """
        if key not in self._by_key:
            raise UsageError(f"no dimension '{key[:40]}': {nearest(key[:40], self)}")
        return self._by_key[key]


def parse_dimensions(text: str, base: Mapping[str, Dimension] | None = None) -> Dimensions:
    """Read a registry written as TOML, one table per dimension: ``positive`` and perhaps ``negative``, each with a
    ``name``, a ``principle`` and perhaps ``wordings`` and ``anchors``; and ``kind``, style unless said otherwise.

    Args:
        text: the TOML.
        base: dimensions that it adds to, replaces in their place, or takes away by ``retired = true``. What people have
            stored on a retired one is kept, and acts no more.

    Raises:
        UsageError: it is no TOML, or a table lacks something, holds something unknown, or retires what is not there.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"this is no TOML: {error}") from error
    found = dict(base or {})
    for key, table in tables.items():
        check_key(key)
        if not isinstance(table, dict):
            raise UsageError(f"'{key}' is no table; a dimension is written [{key}]")
        if "retired" in table:
            if table != {"retired": True}:
                raise UsageError(f"[{key}] holds more than retired = true; what is retired needs nothing else")
            if key not in found:
                raise UsageError(f"[{key}] retires a dimension that is not there: {nearest(key, found)}")
            del found[key]
        else:
            found[key] = _dimension(key, table)
    if not found:
        raise UsageError("no dimension is left")
    return Dimensions(list(found.values()))


def _dimension(key: str, table: Mapping[str, Any]) -> Dimension:
    if unknown := set(table) - {"kind", "positive", "negative"}:
        raise UsageError(f"[{key}] holds '{min(unknown)[:40]}'; there are kind, positive, negative and retired")
    kind = table.get("kind", "style")
    if kind not in ("style", "quality"):
        raise UsageError(f"[{key}] is of kind '{str(kind)[:40]}'; there are style and quality")
    if "positive" not in table:
        raise UsageError(f"[{key}] has no positive pole")
    positive = _pole(key, "positive", table["positive"])
    negative = _pole(key, "negative", table["negative"]) if "negative" in table else None
    if negative and negative.name == positive.name:
        raise UsageError(f"both poles of [{key}] are called '{positive.name[:40]}'")
    return Dimension(key, kind, positive, negative)


def _pole(key: str, side: str, table: Any) -> Pole:
    place = f"the {side} pole of [{key}]"
    if not isinstance(table, dict) or not {"name", "principle"} <= set(table) <= {
        "name",
        "principle",
        "wordings",
        "anchors",
    }:
        raise UsageError(f"{place} has a name, a principle and perhaps wordings and anchors, and nothing else")
    lists = [table.get(key, []) for key in ("anchors", "wordings")]
    if not all(isinstance(texts, list) for texts in lists):
        raise UsageError(f"the anchors and the wordings of {place} are lists of texts")
    anchors, wordings = lists
    for text in (table["name"], table["principle"], *anchors, *wordings):
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"{place} holds an empty text, or what is no text")
    return Pole(table["name"], table["principle"], tuple(anchors), tuple(wordings))


@cache
def default_dimensions() -> Dimensions:
    """The registry that ships with prefmw."""
    return parse_dimensions(files("prefmw.preferences").joinpath("dimensions.toml").read_text(encoding="utf-8"))
