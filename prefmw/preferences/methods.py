"""Alignment methods by name, and the one dial each of them has: its strength.

It needs no torch, so that preferences are edited without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

from prefmw.errors import UsageError, nearest

AUTO = "auto"
"""Let the profile decide: see :func:`prefmw.plans.choose_method`."""


@dataclass(frozen=True)
class Strength:
    """What a method's strength means: its name in the paper, its default, its closed range and what 0 gives."""

    symbol: str
    default: float
    low: float
    high: float
    zero: str


STRENGTHS: dict[str, Strength | None] = {
    "none": None,
    "prompt": None,
    "linear": Strength("ratio", default=2.0, low=0.0, high=10.0, zero="preference prompting, token for token"),
    "drift": Strength("gain", default=1.0, low=0.0, high=5.0, zero="the persona sentence alone"),
    "pad": Strength("beta", default=1.0, low=0.0, high=3.0, zero="prompting under PAD's prefix and candidate rule"),
    "dpa": None,
}
"""The strength of every method; ``None`` where a method takes none."""

METHODS = tuple(STRENGTHS)
"""The methods that this version decodes with."""


GREEDY, STOCHASTIC, BEST_OF_K = CANDIDATES = ("greedy", "stochastic", "best-of-k")
"""How PAD picks: the likeliest candidate, a drawn one, or the best of k whole replies of the base by their reward."""

PAD_TOP_K, PAD_TEMPERATURE = 10, 0.7
"""PAD's candidates of a token, and the temperature of its stochastic ways: the paper's."""


def check_candidate(candidate: str | None) -> str | None:
    """Return ``candidate`` if it is a way of picking, or ``None``.

    Raises:
        UsageError: it is none.
    """
    if candidate is not None and candidate not in CANDIDATES:
        raise UsageError(f"no candidate rule '{str(candidate)[:40]}': {nearest(str(candidate)[:40], CANDIDATES)}")
    return candidate


def check_method(method: str) -> str:
    """Return ``method`` if this version decodes with it, or if it is ``auto``.

    Raises:
        UsageError: no such method; the message lists what there is.
    """
    if not isinstance(method, str):
        raise UsageError(f"a method is named by text, got {type(method).__name__}")
    if method not in METHODS and method != AUTO:
        raise UsageError(f"this version has no method '{method[:40]}': {nearest(method[:40], [AUTO, *METHODS])}")
    return method


def check_strength(method: str, strength: Any) -> float | None:
    """The strength a method runs at: ``strength`` if given, else the method's default, ``None`` if it takes none.

    Raises:
        UsageError: a strength for a method that takes none, or one outside the method's range (NaN included).
    """
    if method not in STRENGTHS:
        raise UsageError(f"a strength belongs to a method, and '{method[:40]}' is none: {', '.join(METHODS)}")
    dial = STRENGTHS[method]
    if dial is None:
        if strength is not None:
            takers = ", ".join(name for name in METHODS if STRENGTHS[name])
            raise UsageError(
                f"method '{method}' takes no strength; leave it out, or choose a method with one: {takers}"
            )
        return None
    if strength is None:
        return dial.default
    if not isinstance(strength, Real):
        raise UsageError(f"a strength is a number, got {type(strength).__name__}")
    if not dial.low <= strength <= dial.high:  # type: ignore[operator]  # NaN is in no range
        span = f"[{dial.low:g}, {dial.high:g}]"
        raise UsageError(f"the strength of '{method}' ({dial.symbol}) lies in {span}, got {str(strength)[:20]}")
    return float(strength)
