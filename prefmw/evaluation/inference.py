"""Inference measured on labelled statements: JSON lines {"text", "expect": {"verbosity": -1, ...}}."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefmw.errors import UsageError
from prefmw.preferences import Dimensions
from prefmw.preferences.inference import Inferer

STATED, SPURIOUS = 0.15, 0.3
"""The least size of a weight that counts as said, and as said where nothing was."""


class Labelled(NamedTuple):
    """A text and the sides it takes: -1 or 1 by dimension, nothing where it states no preference."""

    text: str
    expect: dict[str, int]


def read_labelled(path: Path, dimensions: Dimensions) -> list[Labelled]:
    """Read labelled statements.

    Raises:
        UsageError: the file cannot be read, or a line is no labelled statement; the message says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not valid UTF-8; re-encode it") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            text, expect = given["text"], given["expect"]
            sides = {dimensions.named(key).key: int(side) for key, side in expect.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f'line {number}: expected {{"text": ..., "expect": {{DIM: -1 or 1}}}}') from error
        except UsageError as error:
            raise UsageError(f"line {number}: {error}") from error
        if not isinstance(text, str) or set(sides.values()) - {-1, 1}:
            raise UsageError(f"line {number}: a text, and sides of -1 or 1")
        found.append(Labelled(text, sides))
    if not found:
        raise UsageError(f"'{path}' holds no statement")
    return found


def score_inference(
    statements: Sequence[Labelled],
    inferer: Inferer,
    dimensions: Dimensions,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """How inference does on labelled statements.

    Returns:
        ``sign_accuracy``: of all expected pairs of text and dimension, the share with a weight of the right sign and at
        least :data:`STATED`. ``spurious_rate``: of the style dimensions that a labelled text does not speak of, the
        share with a weight of at least :data:`SPURIOUS`. ``neutral_accuracy``: of the texts that expect nothing, the
        share whose every style weight is below :data:`STATED`. ``None`` where there is nothing to take a share of.
        ``ms_per_text``, warm; ``misses``: the texts behind what is not right.
    """
    keys = [key for key, dimension in dimensions.items() if dimension.kind == "style"]
    inferer.infer(statements[0].text)  # loads the embedder
    pairs, spurious, neutral, misses = [], [], [], []
    seconds = 0.0
    for text, expect in statements:
        begin = time.perf_counter()
        found = {key: one.value for key, one in inferer.infer(text).weights.items()}
        seconds += time.perf_counter() - begin
        right = [found.get(key, 0.0) * side >= STATED for key, side in expect.items()]
        beside = [abs(found.get(key, 0.0)) >= SPURIOUS for key in keys if key not in expect]
        pairs += right
        if expect:
            spurious += beside
        else:
            neutral.append(all(abs(found.get(key, 0.0)) < STATED for key in keys))
        if not all(right) or any(beside) or (not expect and not neutral[-1]):
            misses.append({"text": text, "expect": expect, "found": found})
        progress(1)

    def share(flags: list[bool]) -> float | None:
        return sum(flags) / len(flags) if flags else None

    return {
        "n": len(statements),
        "sign_accuracy": share(pairs),
        "spurious_rate": share(spurious),
        "neutral_accuracy": share(neutral),
        "ms_per_text": 1000 * seconds / len(statements),
        "misses": misses,
    }
