"""Work that takes long, and goes on where it was when it was killed: a folder beside its result holds how far it is.

What decides the result is written down there first. The same work goes on, other work is refused, as
:mod:`prefmw.training.sft` does it with its runs.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prefmw.errors import UsageError

EVERY = 20.0
"""Seconds from one state kept to the next."""


def beside(result: Path) -> Path:
    """The folder that unfinished work on a result leaves beside it."""
    return result.with_name(f"{result.name}.unfinished")


def claim(file: Path, about: Mapping[str, Any], other: str) -> None:
    """Write down in ``file`` what decides a result.

    Raises:
        UsageError: the file says that something else is being made there, which the message calls ``other``.
    """
    ours = (json.dumps(about, indent=1) + "\n").encode()
    if file.is_file() and file.read_bytes() != ours:
        raise UsageError(f"{file.parent} holds {other}; name another --out, or delete it")
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(file, lambda path: path.write_bytes(ours))


class Unfinished:
    """How far the work on one result is.

    Args:
        result: the file that the work makes.
        about: all that decides the result, so that other work is told apart: JSON.

    Raises:
        UsageError: the folder holds other work, or cannot be written to.
    """

    def __init__(self, result: Path, about: Mapping[str, Any]) -> None:
        self.folder = beside(result)
        try:
            claim(self.folder / "about.json", about, "unfinished work with other settings or data")
        except OSError as error:
            raise UsageError(f"'{self.folder}' cannot be written to: {error.strerror}; name another --out") from error
        self._kept_at = time.monotonic()

    def state(self) -> Any:
        """What was kept last: tensors and plain values, as given to :meth:`keep`; ``None`` at the beginning.

        Raises:
            UsageError: it cannot be read.
        """
        file = self.folder / "state.pt"
        try:
            return torch.load(file, weights_only=True) if file.is_file() else None
        except Exception as error:  # torch, zipfile and pickle raise what they like here
            raise UsageError(f"'{file}' cannot be read ({type(error).__name__}); delete {self.folder}") from error

    def keep(self, state: Callable[[], Any]) -> None:
        """Keep ``state()`` in place of what was kept before, if that is a while ago. Who is killed meanwhile leaves the
        one or the other.
        """
        if time.monotonic() - self._kept_at >= EVERY:
            kept = state()
            _write_whole(self.folder / "state.pt", lambda path: torch.save(kept, path))
            self._kept_at = time.monotonic()

    def done(self) -> None:
        """The result is written: forget the way to it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    half = file.with_name(f"{file.name}.{os.getpid()}")
    write(half)
    os.replace(half, file)
