"""How long reads and writes take with many people stored. Works in a database of its own, which must be empty."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from prefmw.errors import UsageError
from prefmw.preferences import Source, Stated, default_dimensions
from prefmw.stores.sql import SQLPreferenceStore

WRITERS = 50
"""Threads that write to one person at once."""


def store_rows(
    store: SQLPreferenceStore, people: int, samples: int, seed: int, progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Times in milliseconds of reading a random person's profile and of writing one of their weights, one after the
    other, and what became of updates that :data:`WRITERS` threads made to one person at once.

    Raises:
        UsageError: somebody is stored already.
    """
    if next(store.users(), None) is not None:
        raise UsageError("the database holds people; give one of its own with --database")
    names = [key for key, dimension in default_dimensions().items() if dimension.kind == "style"]
    rng = random.Random(seed)

    def invented() -> Iterator[dict[str, Any]]:
        for index in range(people):
            weights = {name: round(rng.uniform(-1, 1), 2) for name in rng.sample(names, 3)}
            progress(1)
            yield {"user": f"user{index}", "persona": "a nurse on night shifts who likes it brief", "weights": weights}

    begin = time.perf_counter()
    store.load(invented(), actor="bench")
    rows = [{"what": "load", "n": people, "people_per_s": people / (time.perf_counter() - begin)}]
    rows.append(_times("profile read", samples, lambda: store.profile(f"user{rng.randrange(people)}")))
    rows.append(_times("weight write", samples, lambda: _write(store, f"user{rng.randrange(people)}", rng)))
    rows.append(_crowd(store, "user0", max(1, samples // WRITERS // 10)))
    return rows


def _write(store: SQLPreferenceStore, user_id: str, rng: random.Random) -> None:
    store.write_weights(user_id, {"humor": Stated(rng.uniform(-1, 1))}, source=Source.user, actor="bench")


def _times(what: str, samples: int, call: Callable[[], object]) -> dict[str, Any]:
    times = []
    for _ in range(samples):
        begin = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begin))
    times.sort()
    found = {f"p{percent}_ms": times[min(samples - 1, samples * percent // 100)] for percent in (50, 99)}
    return {"what": what, "n": samples, **found, "max_ms": times[-1]}


def _crowd(store: SQLPreferenceStore, user_id: str, each: int) -> dict[str, Any]:
    """Every thread counts its own dimension up; the number of revisions tells what was lost."""
    before = store.profile(user_id).revision
    errors: list[str] = []

    def write(index: int) -> None:
        for step in range(1, each + 1):
            try:
                weights = {f"bench{index}": Stated(step / each)}
                store.write_weights(user_id, weights, source=Source.user, actor="bench")
            except Exception as error:  # counted, whatever it is
                errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=write, args=(index,)) for index in range(WRITERS)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    after = store.profile(user_id)
    lost = WRITERS * each - (after.revision - before) - len(errors)
    return {
        "what": f"{WRITERS} writers of one person",
        "n": WRITERS * each,
        "lost": lost,
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "writes_per_s": WRITERS * each / seconds,
    }
