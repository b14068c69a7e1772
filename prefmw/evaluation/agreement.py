"""How far readers and the oracles agree, on replies that readers rated without knowing method or preference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmw.errors import UsageError
from prefmw.evaluation.oracles import FOLLOWED, measure
from prefmw.training.styles import AXES


@dataclass(frozen=True)
class Rated:
    """One reply and each reader's rating of each axis: -1, 0 or 1; and whether the reply made sense to them."""

    text: str
    ratings: tuple[dict[str, int], ...]
    sensible: tuple[bool, ...]


def read_ratings(path: Path) -> list[Rated]:
    """Rated replies from JSON lines with keys text, ratings and sensible.

    Raises:
        UsageError: the file cannot be read, or a line is not of this form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        rated = [Rated(row["text"], tuple(row["ratings"]), tuple(row["sensible"])) for row in rows]
        if not rated or not all(map(_is_sound, rated)):
            raise ValueError("not ratings")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} holds no ratings: expected a JSON object a line with text, ratings, sensible"
        ) from error
    return rated


def _is_sound(reply: Rated) -> bool:
    ratings = [rating for rating in reply.ratings if set(rating) == set(AXES) and set(rating.values()) <= {-1, 0, 1}]
    sensible = [verdict for verdict in reply.sensible if isinstance(verdict, bool)]
    return isinstance(reply.text, str) and 0 < len(reply.ratings) == len(ratings) == len(sensible)


def agreement(replies: Sequence[Rated]) -> list[dict[str, Any]]:
    """Per axis, over all replies.

    Keys: ``spearman`` between the oracle and the readers' mean; ``same_pole`` how often the oracle has the right sign
    and size at least 0.2 where all readers named the same pole, and ``n`` of those; ``false_pole`` how often it names
    a pole where all readers saw none; ``readers`` the share of replies on which all readers agree exactly.
    """
    rows = []
    for axis in AXES:
        values = [measure(reply.text)[axis] for reply in replies]
        rated = [[rating[axis] for rating in reply.ratings] for reply in replies]
        means = [sum(ratings) / len(ratings) for ratings in rated]
        poles = [(value, ratings[0]) for value, ratings in zip(values, rated, strict=True) if len(set(ratings)) == 1]
        named = [(value, pole) for value, pole in poles if pole]
        none = [value for value, pole in poles if not pole]
        rows.append(
            {
                "axis": axis,
                "spearman": _spearman(values, means),
                "n": len(named),
                "same_pole": _share([value * pole >= FOLLOWED for value, pole in named]),
                "false_pole": _share([abs(value) >= FOLLOWED for value in none]),
                "readers": _share([len(set(ratings)) == 1 for ratings in rated]),
            }
        )
    return rows


def _spearman(values: Sequence[float], means: Sequence[float]) -> float | None:
    """Rank correlation; ``None`` where either side is all alike."""
    from scipy.stats import spearmanr

    if len(set(values)) == 1 or len(set(means)) == 1:
        return None
    return round(float(spearmanr(values, means).statistic), 3)


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 3) if hits else None
