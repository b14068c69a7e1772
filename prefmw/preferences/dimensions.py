"""The registry of dimensions: what a preference can be set on. Its content is data, ``dimensions.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from prefmw.errors import UsageError, nearest

Kind = Literal["style", "quality"]


@dataclass(frozen=True)
class Pole:
    """One end of a dimension: its name and the sentence that asks a model for it."""

    name: str
    principle: str


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


def parse_dimensions(text: str) -> Dimensions:
    """Read a registry written as TOML, one table per dimension: ``kind``, ``positive`` and perhaps ``negative``."""

    def pole(table: Mapping[str, Any]) -> Pole:
        return Pole(name=table["name"], principle=table["principle"])

    return Dimensions(
        [
            Dimension(
                key=key,
                kind=table["kind"],
                positive=pole(table["positive"]),
                negative=pole(table["negative"]) if "negative" in table else None,
            )
            for key, table in tomllib.loads(text).items()
        ]
    )


@cache
def default_dimensions() -> Dimensions:
    """The registry that ships with prefmw."""
    return parse_dimensions(files("prefmw.preferences").joinpath("dimensions.toml").read_text(encoding="utf-8"))
