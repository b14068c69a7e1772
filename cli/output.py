"""What a person or a program reads: one line to stderr, JSON, tables, weights as bars."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TextIO

from prefmw.cli.options import dpa_card, registry
from prefmw.errors import UsageError
from prefmw.preferences import (
    STRENGTHS,
    Dimensions,
    Profile,
    Source,
    dials_of,
    direction_of,
    persona_sentence,
    principle_text,
)
from prefmw.preferences.directions import written

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from prefmw.choices import Lesson
    from prefmw.preferences.inference import Inference


TELL_EVERY = 15.0
"""Seconds from one line about long work to the next, off a terminal."""


def say(text: str) -> None:
    """One line for the person, on stderr."""
    print(printable(" ".join(text.splitlines())), file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """A piece of a reply, on stdout at once; on a terminal no control sequence gets through."""
    if sys.stdout.isatty():
        text = printable(text)
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """A result for a program, on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


@contextmanager
def loading(model: str) -> Iterator[None]:
    """A spinner on stderr while imports and weights load, on a terminal only; libraries keep quiet meanwhile."""
    import warnings

    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"loading {model} ...") if console.is_terminal else nullcontext(), _uncollected():
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        hub_logging.set_verbosity_error()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile, and none of what the first such time leaves, ever. What torch and transformers
    import are some 400,000 objects that stay; going through them again and again takes a quarter of a command's start.
    """
    import gc

    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        if enabled:
            gc.enable()


def progress_bar(*columns: str | ProgressColumn) -> Progress:
    """A bar for long work, on stderr and on a terminal only; rich's own columns where none are given."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def progress(unit: str) -> Iterator[Callable[[int], None]]:
    """A count on stderr while long work runs, on a terminal only; call it with how many more are done."""
    from rich.progress import MofNCompleteColumn, SpinnerColumn, TimeElapsedColumn

    with progress_bar(SpinnerColumn(), unit, MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda count: bar.advance(task, count)


@contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """What long work is at, and how far, on stderr: a bar on a terminal, elsewhere a line now and then; call it with
    both.
    """
    told = time.monotonic()

    def line(what: str, share: float) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_EVERY:
            say(f"{what}: {share:.0%}")
            told = time.monotonic()

    with progress_bar() as bar:
        task = bar.add_task("", total=1.0)
        yield line if bar.disable else lambda what, share: bar.update(task, description=what, completed=share)


def print_inference(inference: Inference, dimensions: Dimensions) -> None:
    """What a text states, for a person: weights as bars, the words that say so, and the anchors they resemble."""
    for key, one in sorted(inference.weights.items(), key=lambda item: -abs(item[1].value)):
        pole = dimensions[key].pole(one.value).name
        print(f'{key:<13}{one.value:+.2f}  {bar(one.value)}  {pole:<11} "{printable(one.clause)}"')
        for proof in one.because:
            print(f"{'':<13}{proof.similarity:.2f}  {printable(proof.anchor)}")
    for key, pair in inference.conflicts.items():
        said = ", but ".join(f'"{printable(one.clause)}" says {dimensions[key].pole(one.value).name}' for one in pair)
        print(f"{key:<13}       {said}: left unset")
    if not inference.weights and not inference.conflicts:
        say("no preference was found in this")


def print_lesson(lesson: Lesson, profile: Profile) -> None:
    """What choices say of a person's weights, for a person."""
    learned = lesson.learned
    assert learned is not None
    for index, key in enumerate(lesson.dimensions):
        value, low, high = (float(row[index]) for row in (learned.weights, learned.low, learned.high))
        fate = "not sure yet"
        if key in lesson.stored:
            acts = profile.weights[key]
            covered = f", but the {acts.source.name}'s {acts.value:+.2f} covers it"
            fate = "learned" + (covered if acts.source is not Source.learned else "")
        print(f"{key:<13}{value:+.2f}  {bar(value)}  {low:+.2f} to {high:+.2f}  {fate}")
    print(f"{lesson.choices} choices; the others predict {lesson.accuracy:.0%} of them")


def printable(text: str) -> str:
    """The text with control characters shown instead of obeyed; line breaks and tabs stay."""
    return "".join(char if char in "\n\t" or not _is_control(char) else f"\\x{ord(char):02x}" for char in text)


def _is_control(char: str) -> bool:
    return ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, as wide as its longest cells allow."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell).replace("\n", " ")) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def shorten(text: str, width: int = 60) -> str:
    """The text on one line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def profile_json(profile: Profile, dimensions: Dimensions) -> dict[str, Any]:
    """A profile as ``prefs show --json`` and ``users show --json`` print it."""
    return {
        "user": profile.user_id,
        "persona": profile.persona,
        "revision": profile.revision,
        "weights": {key: weight.as_json() for key, weight in profile.weights.items()},
        "principle": principle_text(profile, dimensions),
        "dials": {dial.dimension: dial.as_json() for dial in dials_of(profile, dimensions)},
        "method": profile.method,
        "strengths": {name: profile.strengths.get(name) for name, dial in STRENGTHS.items() if dial},
        "direction": _direction(profile),
    }


def _direction(profile: Profile) -> dict[str, Any] | None:
    """The direction that dpa would read, with its prompt; ``None`` where the settings' model has no checkpoint."""
    card = dpa_card()
    if card is None:
        return None
    try:
        return {"checkpoint": card.name, **direction_of(profile, card).as_json()}
    except UsageError as error:
        return {"checkpoint": card.name, "error": str(error)}


def show_profile(profile: Profile, json: bool) -> None:
    """A profile on stdout, for a program or a person."""
    if json:
        print_json(profile_json(profile, registry()))
    else:
        print_profile(profile, registry())


def print_profile(
    profile: Profile, dimensions: Dimensions, file: TextIO | None = None, *, method: str | None = None
) -> None:
    """A profile for a person: persona, weights as bars, and what they add up to under its method, or another."""
    lines = [
        f"{profile.user_id}  (revision {profile.revision})",
        f"persona    {printable(profile.persona) or '–'}",
        f"method     {_method(profile)}",
    ]
    if profile.weights:
        lines.append("weights")
        for key, weight in sorted(profile.weights.items(), key=lambda item: -abs(item[1].value)):
            pole = dimensions[key].pole(weight.value).name if key in dimensions else "retired"
            pole = pole if weight.value else "neither"
            lines.append(f"  {key:<13}{weight.value:+.2f}  {bar(weight.value)}  {pole:<11} {_origin(profile, key)}")
    if (method or profile.method) == "drift":
        lines.append(f"principle  {printable(persona_sentence(profile)) or '–'}")
        lines += [
            f"dial       {dial.dimension} {dial.weight:+.2f}  {printable(dial.principle)}"
            for dial in dials_of(profile, dimensions)
        ]
    else:
        principle = principle_text(profile, dimensions)
        lines.append(f"principle  {printable(principle) or '– (no persona, and no style weight of 0.15 or more)'}")
    lines += _direction_lines(profile, method or profile.method)
    print(*lines, sep="\n", file=file or sys.stdout)


def _direction_lines(profile: Profile, method: str | None) -> list[str]:
    """The direction and the prompt of dpa, where a weight calls for one or it is the method."""
    card = dpa_card()
    if card is None or not (method == "dpa" or {card.dimension(one) for one in card.attributes} & set(profile.weights)):
        return []
    try:
        direction = direction_of(profile, card)
    except UsageError as error:
        return [f"direction  – ({error})"]
    text = written(direction.attributes, direction.asked)
    if direction.is_projected:
        text += f", beyond what '{card.name}' was trained on: {written(direction.attributes, direction.applied)}"
    return [f"direction  {text}", f"prompt     {printable(direction.prompt)}"]


def bar(weight: float, half: int = 10) -> str:
    """A weight in [-1, 1] as a bar around a middle: ``····██████|··········`` for -0.6."""
    size = round(abs(weight) * half)
    left = "█" * size if weight < 0 else ""
    right = "█" * size if weight > 0 else ""
    return f"{left:·>{half}}|{right:·<{half}}"


def _method(profile: Profile) -> str:
    strengths = ", ".join(f"{name} strength {value:g}" for name, value in profile.strengths.items())
    return (profile.method or "auto") + (f" ({strengths})" if strengths else "")


def _origin(profile: Profile, key: str) -> str:
    """Who set the effective weight, and what it covers: ``user (over inferred +0.40)``."""
    layers = sorted((layer for layer in profile.layers if layer.dimension == key), key=lambda layer: -layer.source)
    beneath = ", ".join(f"{layer.source.name} {layer.value:+.2f}" for layer in layers[1:])
    return layers[0].source.name + (f" (over {beneath})" if beneath else "")
