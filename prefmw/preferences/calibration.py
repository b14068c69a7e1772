"""A chat model's calibration: the words that ask it for each pole, and how far half a weight on that side goes.

Models differ in what a sentence makes of them. ``prefmw prefs calibrate`` measures it
(:mod:`prefmw.evaluation.calibrate`); what it found is applied to the registry of dimensions, so that everything that
reads a pole's sentence or turns a dial has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from prefmw.errors import UsageError
from prefmw.preferences.dimensions import Dimension, Dimensions, Pole


class Tuned(NamedTuple):
    """A pole on one model: the sentence that asks for it, and how far half a weight goes towards its reading."""

    principle: str
    midpoint: float


@dataclass(frozen=True)
class Calibration:
    """What was measured on a model's weights of ``revision``: poles by dimension and by the pole's name."""

    model: str
    revision: str
    poles: Mapping[str, Mapping[str, Tuned]]

    def applied(self, dimensions: Dimensions) -> Dimensions:
        """The registry with this model's words and midpoints. A pole that was not measured, or has other sentences by
        now, stays as it is.
        """
        return Dimensions([self._tuned(key, dimension) for key, dimension in dimensions.items()])

    def _tuned(self, key: str, dimension: Dimension) -> Dimension:
        found = self.poles.get(key, {})

        def tuned(pole: Pole) -> Pole:
            one = found.get(pole.name)
            if one is None or one.principle not in (pole.principle, *pole.wordings):
                return pole
            return replace(pole, principle=one.principle, midpoint=one.midpoint)

        negative = dimension.negative and tuned(dimension.negative)
        return replace(dimension, positive=tuned(dimension.positive), negative=negative)

    def to_json(self) -> str:
        """As a calibration file holds it."""
        poles = {key: {name: one._asdict() for name, one in named.items()} for key, named in self.poles.items()}
        return json.dumps({"model": self.model, "revision": self.revision, "poles": poles}, indent=1)

    @staticmethod
    def from_json(text: str) -> Calibration:
        """What :meth:`to_json` wrote.

        Raises:
            UsageError: it is something else.
        """
        try:
            table: dict[str, Any] = json.loads(text)
            poles = {
                key: {name: Tuned(str(one["principle"]), float(one["midpoint"])) for name, one in named.items()}
                for key, named in table["poles"].items()
            }
            found = Calibration(str(table["model"]), str(table["revision"]), poles)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"this is no calibration: {error}") from error
        tuned = [one for named in poles.values() for one in named.values()]
        if not all(one.principle.strip() and 0.01 <= one.midpoint <= 0.99 for one in tuned):
            raise UsageError("a calibration gives every pole a sentence and a midpoint from 0.01 to 0.99")
        return found
