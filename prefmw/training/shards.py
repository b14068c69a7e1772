"""Samples on disk, a file for every few prompts, so that a run that is killed loses a shard at most.

A line of a shard is one prompt's (or one prompt's and direction's) replies: ``{"prompt", "asked", "replies": [{"text",
"ended", "asked", "rewards"}]}``. Of several processes (``accelerate launch``, ``torchrun``) each draws its share of the
shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmw.preferences.directions import DPACard, Vector


@dataclass(frozen=True)
class Reply:
    """A drawn reply: whether it came to its end, the rewards or the direction asked of it, and the rewards it has."""

    text: str
    ended: bool
    asked: Vector
    rewards: Vector


@dataclass(frozen=True)
class Drawing:
    """The replies to one prompt, by its number, under one direction where they share one."""

    prompt: int
    direction: Vector | None
    replies: tuple[Reply, ...]

    def best(self, direction: Vector, card: DPACard) -> Reply | None:
        """The reply with the greatest v . r, of those that came to their end; ``None`` where none did."""
        whole = [reply for reply in self.replies if reply.ended and reply.text.strip()]
        if not whole:
            return None
        return max(whole, key=lambda reply: card.value(direction, reply.rewards))


def draw_shards(
    folder: Path,
    prompts: Sequence[int],
    size: int,
    make: Callable[[Sequence[int]], list[Drawing]],
    progress: Callable[[int, int], None],
    *,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Have ``make`` draw for ``size`` prompts at a time, and write each lot to its file; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    lots = [prompts[at : at + size] for at in range(0, len(prompts), size)]
    for number, lot in enumerate(lots):
        file = folder / f"{number:05d}.jsonl"
        if number % processes == process and not file.is_file():
            lines = [json.dumps(_as_json(drawing)) + "\n" for drawing in make(lot)]
            unfinished = file.with_suffix(f".{process}.unfinished")
            unfinished.write_text("".join(lines), encoding="utf-8")
            unfinished.replace(file)
        progress(number + 1, len(lots))


def read_shards(folder: Path) -> Iterator[Drawing]:
    """Everything that was drawn, in the order of the shards."""
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            replies = tuple(
                Reply(one["text"], one["ended"], tuple(one["asked"]), tuple(one["rewards"])) for one in row["replies"]
            )
            direction = None if row["direction"] is None else tuple(row["direction"])
            yield Drawing(row["prompt"], direction, replies)


def _as_json(drawing: Drawing) -> dict[str, Any]:
    return {
        "prompt": drawing.prompt,
        "direction": drawing.direction,
        "replies": [
            {
                "text": reply.text,
                "ended": reply.ended,
                "asked": reply.asked,
                "rewards": [round(reward, 3) for reward in reply.rewards],
            }
            for reply in drawing.replies
        ],
    }
