"""The anchor bank: statements labelled with the pole they ask for, and others that ask for none. ``anchors.toml``."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import NamedTuple

from prefmw.preferences.dimensions import Dimensions


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


def anchor_bank(dimensions: Dimensions) -> list[Anchor]:
    """The shipped statements (``[DIMENSION.POLE] anchors`` and ``[neutral] anchors`` of ``anchors.toml``), as far as
    ``dimensions`` has that pole, and those that come with a pole itself.
    """
    table = tomllib.loads(files("prefmw.preferences").joinpath("anchors.toml").read_text(encoding="utf-8"))
    bank = [Anchor(statement, None, 0) for statement in table["neutral"]["anchors"]]
    for key, dimension in dimensions.items():
        for side, pole in ((-1, dimension.negative), (1, dimension.positive)):
            shipped = table.get(key, {}).get(pole.name, {}).get("anchors", []) if pole else []
            bank += [Anchor(statement, key, side) for statement in (*shipped, *(pole.anchors if pole else ()))]
    return bank
