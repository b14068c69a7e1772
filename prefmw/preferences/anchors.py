"""The anchor bank: statements labelled with the pole they ask for, and others that ask for none. ``anchors.toml``."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from prefmw.preferences.dimensions import Dimensions, default_dimensions


class Anchor(NamedTuple):
    """A statement, the dimension it is about and the pole it asks for; ``None`` and 0 where it asks for none."""

    text: str
    dimension: str | None
    side: int

    def pole(self, dimensions: Dimensions) -> str:
        """The name of its pole."""
        if self.dimension is None:
            return "neutral"
        return dimensions[self.dimension].pole(self.side).name


def parse_anchors(text: str, dimensions: Dimensions) -> list[Anchor]:
    """Read a bank written as TOML: ``[DIMENSION.POLE] anchors = [...]``, and ``[neutral] anchors = [...]``."""
    table = tomllib.loads(text)
    bank = [Anchor(statement, None, 0) for statement in table.get("neutral", {}).get("anchors", [])]
    for key, dimension in dimensions.items():
        for side, pole in ((-1, dimension.negative), (1, dimension.positive)):
            named = table.get(key, {}).get(pole.name, {}) if pole else {}
            bank += [Anchor(statement, key, side) for statement in named.get("anchors", [])]
    return bank


@cache
def default_anchors() -> list[Anchor]:
    """The bank that ships with prefmw, for the default dimensions."""
    text = files("prefmw.preferences").joinpath("anchors.toml").read_text(encoding="utf-8")
    return parse_anchors(text, default_dimensions())
