"""What every evaluation has in common: what decided it is written down, a run that was killed goes on where it was, and
no two versions are ever mixed.

A run's folder holds ``run.json`` (what decides it), ``units.jsonl`` (what is measured so far, a unit a line),
``result.json`` (the tables and all that is known of how they came to be) and its pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from prefmw._version import __version__
from prefmw.errors import UsageError
from prefmw.preferences import Dimensions
from prefmw.steering import Backend

FORMAT = 1
"""Of a run's folder; another one is refused."""

ABOUT, UNITS, RESULT = "run.json", "units.jsonl", "result.json"


class Run:
    """An evaluation under way.

    Args:
        command: which one, ``steer`` say.
        settings: all that decides its numbers, as JSON; its seed and n among them.
        folder: where it is kept; ``None`` keeps nothing.

    Raises:
        UsageError: the folder holds something else, a run of other settings, or one of another version.
    """

    def __init__(self, command: str, settings: Mapping[str, Any], folder: Path | None = None) -> None:
        self.command = command
        self.settings = dict(settings)
        self.folder = folder
        self._kept: dict[str, Any] = {}
        if folder is not None:
            self._claim(folder)

    def __contains__(self, name: str) -> bool:
        """Whether that unit is measured."""
        return name in self._kept

    def unit(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, JSON; of a run that goes on, what it returned before it was killed."""
        if name not in self._kept:
            value = make()
            self._kept[name] = value
            if self.folder is not None:
                with (self.folder / UNITS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"unit": name, "value": value}, ensure_ascii=False) + "\n")
        return self._kept[name]

    def result(self, **tables: Any) -> dict[str, Any]:
        """The run's result, written to its folder where it has one: its tables, ``rows`` mostly, and ``settings``."""
        found = {**tables, "settings": {**self.settings, **_made_by()}, "command": self.command, "format": FORMAT}
        if self.folder is not None:
            _write_whole(self.folder / RESULT, found)
        return found

    def _claim(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"'{folder}' is no folder; name one with --out")
        found = git()
        ours = {"format": FORMAT, "command": self.command, "settings": self.settings}
        ours |= {"versions": versions(), "code": found.code if found else None}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / ABOUT).is_file() and any(folder.iterdir()):
                raise UsageError(f"'{folder}' is not empty and holds no run; name another folder with --out")
            if not (folder / ABOUT).is_file():
                _write_whole(folder / ABOUT, ours)
            self._compare(folder, ours)
            self._read_units(folder / UNITS)
        except OSError as error:
            raise UsageError(f"'{folder}' cannot be used: {error.strerror}; name another folder with --out") from error

    @staticmethod
    def _compare(folder: Path, ours: Mapping[str, Any]) -> None:
        theirs = read_json(folder / ABOUT)
        check_format(folder, theirs)
        for key in ("command", "settings", "versions", "code"):
            if theirs.get(key) != json.loads(json.dumps(ours[key])):
                told = {"command": "another command", "settings": "other settings"}.get(key, "another version")
                raise UsageError(
                    f"'{folder}' holds a run of {told} ({_difference(theirs.get(key), ours[key])}); results are never "
                    "mixed: name another folder with --out, or delete that one"
                )

    def _read_units(self, file: Path) -> None:
        """Take over what is measured; a line that a kill cut off is dropped, and measured again."""
        if not file.is_file():
            return
        lines = file.read_text(encoding="utf-8").split("\n")
        whole = lines[:-1]
        for line in whole:
            try:
                entry = json.loads(line)
                self._kept[entry["unit"]] = entry["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"'{file}' is damaged; delete {file.parent} and run again") from error
        if lines[-1]:
            file.write_text("".join(line + "\n" for line in whole), encoding="utf-8")


def check_format(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise UsageError where a run or result is of another format than this version's."""
    if about.get("format") != FORMAT:
        raise UsageError(
            f"'{folder}' holds a run of another version (format {str(about.get('format'))[:20]}, expected {FORMAT}); "
            "run it again with this one into another folder"
        )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UsageError: the file holds none, or cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"'{file}' cannot be read as JSON; delete it and run again") from error
    if not isinstance(found, dict):
        raise UsageError(f"'{file}' holds no JSON object; delete it and run again")
    return found


def model_used(backend: Backend, dimensions: Dimensions) -> dict[str, Any]:
    """What a result says of the chat model, and of the words and midpoints that preferences are put to it with."""
    chat = backend.chat
    return {
        "model": chat.name,
        "model_revision": chat.revision,
        "dtype": chat.dtype,
        "device": str(chat.device),
        "quantization": chat.spec.quantization,
        "template_options": chat.spec.template_options,
        "dimensions": hashlib.sha256(repr(tuple(dimensions.items())).encode()).hexdigest()[:16],
    }


def versions() -> dict[str, str]:
    """The versions of what computes."""
    return {"prefmw": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def _made_by() -> dict[str, Any]:
    found = git()
    return {"versions": versions(), "git": found.commit if found else None}


class Checkout(NamedTuple):
    """The commit that this package is checked out at, with ``-dirty`` behind it where the package's files differ; and
    what the package is there, which other commits may share.
    """

    commit: str
    code: str


@cache
def git() -> Checkout | None:
    """Where this package is checked out; ``None`` where it is installed otherwise."""
    here = Path(__file__).resolve().parents[1]

    def run(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not run("ls-files", "--error-unmatch", "evaluation/runs.py"):
            return None  # an environment that lies in somebody else's repository
        changed = "-dirty" if run("status", "--porcelain", "--", ".") else ""
        return Checkout(run("rev-parse", "--short=12", "HEAD") + changed, run("rev-parse", "HEAD:./") + changed)
    except (OSError, subprocess.SubprocessError):
        return None


def _difference(theirs: Any, ours: Any) -> str:
    """The first entry in which two descriptions differ, in a few words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*ours, *theirs]:
            if theirs.get(key) != json.loads(json.dumps(ours.get(key))):
                return f"{key}: {str(theirs.get(key))[:40]}, here {str(ours.get(key))[:40]}"
    return f"{str(theirs)[:40]}, here {str(ours)[:40]}"


def _write_whole(file: Path, value: Any) -> None:
    half = file.with_name(f"{file.name}.{os.getpid()}")
    half.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(half, file)
