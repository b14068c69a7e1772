"""The threads that torch computes with on a CPU: one set of them at a time is quick, two get in each other's way.

Every thread that runs a torch operation on several cores gets a team of helpers from OpenMP, which stay when the
operation is done. While there are more such threads in a process than cores, GNU's OpenMP lets them sleep at once
between two operations rather than wait a moment, and waking them takes longer than a small product: a token cost 1.6
times as much on two cores, only because another thread had loaded the model.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

PAUSE_SOFT = 1
"""OpenMP 5.0's ``omp_pause_soft``: let go of the threads, keep the settings."""


def dismiss_helpers() -> None:
    """Let go of the calling thread's helpers; its next operation on several cores calls new ones, in about 0.1 ms.
    Does nothing where torch computes with another library.
    """
    pause = _pause()
    if pause is not None:
        pause(PAUSE_SOFT)


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """GNU OpenMP's ``omp_pause_resource_all`` of the library that torch computes with."""
    if not sys.platform.startswith("linux"):
        return None
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            return ctypes.CDLL(str(library)).omp_pause_resource_all
        except (OSError, AttributeError):  # one that cannot be opened, or is older than OpenMP 5.0
            continue
    return None


if hasattr(os, "register_at_fork"):  # a child has the record of its parent's helpers, not them, and would wait for them
    os.register_at_fork(before=dismiss_helpers)
