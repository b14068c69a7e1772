"""A profile as TOML in the person's own editor, checked before anything is saved."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import typer

from prefmw.cli.options import actor, registry
from prefmw.cli.output import say
from prefmw.errors import UsageError
from prefmw.preferences import (
    AUTO,
    METHODS,
    STRENGTHS,
    Dimensions,
    PreferenceStore,
    Profile,
    Source,
    Stated,
    check_method,
    check_persona,
    check_strength,
)


def edit_profile(store: PreferenceStore, profile: Profile, reason: str) -> Profile:
    """Open the profile in the editor until it can be read, then store it as one revision.

    Raises:
        UsageError: there is no terminal or no editor, or what was saved cannot be read and is not edited again.
        ConflictError: somebody changed the profile meanwhile.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("nothing to change; give --persona, --method, --strength or --clear-strengths")
    dimensions = registry()
    text = profile_toml(profile, dimensions)
    while True:
        text = edited(text, "profile.toml")
        try:
            changes = read_profile(text, profile, dimensions)
            break
        except UsageError as error:
            say(f"prefmw: {error}")
            if not typer.confirm("Edit again?", default=True, err=True):
                raise UsageError("nothing was changed") from error
    return store.edit_user(profile.user_id, **changes, actor=actor(), reason=reason, expected_revision=profile.revision)


def profile_toml(profile: Profile, dimensions: Dimensions) -> str:
    """What a person may change of a profile: persona, method, strengths and the weights they set themselves."""
    own = {key: weight.value for key, weight in profile.layer(Source.user).items()}
    lines = [
        f"# {profile.user_id}, revision {profile.revision}. Take the # from a line to set what it says.",
        "",
        f"persona = {_quoted(profile.persona)}",
        f'method = "{profile.method or AUTO}"',
        "",
        "[strengths]",
    ]
    for name in METHODS:
        dial = STRENGTHS[name]
        if dial and name in profile.strengths:
            lines.append(f"{name} = {profile.strengths[name]!r}")
        elif dial:
            lines.append(f"# {name} = {dial.default!r}  # {dial.low:g} to {dial.high:g}")
    lines += ["", "[weights]  # -1 to 1"]
    for key in [*dimensions, *(key for key in own if key not in dimensions)]:
        dimension = dimensions.get(key)
        poles = "retired"
        if dimension:
            poles = f"{dimension.negative.name if dimension.negative else '0'} to {dimension.positive.name}"
        effective = profile.weights.get(key)
        other = effective if effective and effective.source is not Source.user else None
        said = f"{poles}, {other.source.name} {other.value:+g}" if other else poles
        name = key if key.replace("_", "").isalnum() and key.isascii() else _quoted(key)
        lines.append(f"{name} = {own[key]!r}  # {said}" if key in own else f"# {name} = 0.0  # {said}")
    return "\n".join(lines) + "\n"


def read_profile(text: str, profile: Profile, dimensions: Dimensions) -> dict[str, Any]:
    """What an edited text changes, as arguments of ``PreferenceStore.edit_user``.

    Raises:
        UsageError: it is no TOML, or holds an unknown entry or a value out of range.
    """
    if not text.strip():
        raise UsageError("the text is empty; to change nothing, leave it as it was")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"this is no TOML: {error}") from error
    if unknown := set(table) - {"persona", "method", "strengths", "weights"}:
        raise UsageError(f"unknown entry '{min(unknown)[:40]}'; there are persona, method, strengths and weights")
    persona, method = table.get("persona", ""), table.get("method", AUTO)
    if not isinstance(persona, str):
        raise UsageError("the persona is text in quotation marks")
    strengths = _numbers(table, "strengths")
    weights = _numbers(table, "weights")
    for name, strength in strengths.items():
        check_strength(check_method(name), strength)
    own = {key: weight.value for key, weight in profile.layer(Source.user).items()}
    for name, weight in weights.items():
        if name not in own or name in dimensions:  # a retired one may stay
            dimensions.named(name).check(weight)
    return {
        "persona": check_persona(persona),
        "method": None if check_method(method) == AUTO else method,
        "strengths": {**dict.fromkeys(profile.strengths), **strengths},
        "weights": {
            **{name: None for name in own if name not in weights},
            **{name: Stated(weight) for name, weight in weights.items() if own.get(name) != weight},
        },
    }


def _quoted(text: str) -> str:
    """A TOML string; JSON's, which leaves but one of the characters alone that TOML does not take."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _numbers(table: dict[str, Any], name: str) -> dict[str, float]:
    values = table.get(name, {})
    if not isinstance(values, dict) or any(
        isinstance(x, bool) or not isinstance(x, int | float) for x in values.values()
    ):
        raise UsageError(f"[{name}] is a table of numbers")
    return values


def edited(text: str, name: str) -> str:
    """The text after the person's editor was closed; ``name`` tells the editor what kind of file it is.

    Raises:
        UsageError: the editor cannot be run, failed, or saved what is no text.
    """
    named = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        command = shlex.split(named) or ["vi"]
    except ValueError as error:
        raise UsageError(f"EDITOR holds '{named[:40]}', which is no command: {error}") from error
    with tempfile.TemporaryDirectory(prefix="prefmw-") as folder:  # readable by its owner alone
        file = Path(folder) / name
        file.write_text(text, encoding="utf-8")
        try:
            code = subprocess.run([*command, str(file)], check=False).returncode
        except OSError as error:
            raise UsageError(f"the editor '{command[0]}' cannot be run; set EDITOR to another") from error
        if code:
            raise UsageError(f"the editor '{command[0]}' ended with code {code}; nothing was changed")
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("what the editor saved is not UTF-8 text; nothing was changed") from error
