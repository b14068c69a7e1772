"""Fits the read-out of preferences: a low-rank adapter and a head on the embedder's encoder.

It learns from the anchor bank and from ``preference_files/``: statements of many kinds for either pole, qualities by
those who like and dislike them put into sentences of either attitude, pairs of statements joined, and texts that state
nothing. A tenth of what people wrote is held out; on it the threshold is chosen, the least at which nearly all texts
that state nothing are left alone, and the rest is measured.
"""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prefmw.errors import UsageError
from prefmw.models import readout as adapter
from prefmw.models.embedder import Embedder
from prefmw.models.readout import LONGEST, Reader, ReadOut, adapted, learned
from prefmw.preferences.anchors import Anchor
from prefmw.preferences.dimensions import Dimensions, default_dimensions
from prefmw.preferences.inference import Embed
from prefmw.training.unfinished import Unfinished

RANK, EPOCHS, BATCH, LEARNING_RATE = 8, 4, 64, 2e-3

HELD_OUT = 0.1
LEFT_ALONE = 0.97
"""Share of the held-out texts that state nothing which no dimension may take a side on."""

MULTILINGUAL = 0.8
"""Share of a language's translations that an embedder must put nearest to their English, to be taught their sides."""

PAIRS = 6000
"""Pairs of statements about different dimensions, joined."""


_FOLDER = files("prefmw.training") / "preference_files"


class Example(NamedTuple):
    """A text and the sides it takes; ``weight`` in the loss. ``written`` by hand, not put together of qualities or of
    two others; of such alone some are ``held_out`` from the fit.
    """

    text: str
    sides: dict[str, int]
    weight: float
    written: bool = False
    held_out: bool = False


def examples(anchors: Sequence[Anchor], dimensions: Dimensions, seed: int) -> list[Example]:
    """Every text to fit on, and those held out; no pair is made of one that is held out."""
    rng = random.Random(seed)
    found = [
        Example(anchor.text, {anchor.dimension: anchor.side} if anchor.dimension else {}, 2.0 - abs(anchor.side), True)
        for anchor in anchors
    ]
    neutral = tomllib.loads((_FOLDER / "neutral.toml").read_text(encoding="utf-8"))
    found += [Example(text, {}, 2.0, True) for text in neutral["texts"]]
    attitudes = neutral["attitudes"]
    for key, dimension in dimensions.items():
        if key not in default_dimensions() or not (file := _FOLDER / f"{key}.toml").is_file():
            continue
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        if set(dimension.poles) != set(table) or dimension.negative is None:  # replaced by a deployment's own
            continue
        named = {-1: table[dimension.negative.name], 1: table[dimension.positive.name]}
        for side, pole in named.items():
            found += [Example(text, {key: side}, 1.0, True) for text in pole["statements"]]
            for quality, sign in [*((q, 1) for q in pole["liked"]), *((q, -1) for q in pole["disliked"])]:
                found.append(Example(quality, {key: side}, 0.3))
                wanted = rng.sample(attitudes["positive"], 2 if sign > 0 else 1)
                refused = rng.sample(attitudes["negative"], 1 if sign > 0 else 2)
                found += [Example(form.format(x=quality), {key: side}, 0.5) for form in wanted]
                found += [Example(form.format(x=quality), {key: -side}, 0.5) for form in refused]
                other = rng.choice(named[-side]["disliked" if sign > 0 else "liked"])
                x, y = (quality, other) if sign > 0 else (other, quality)
                compared = rng.choice(attitudes["comparative"]).format(x=x, y=y)
                found.append(Example(compared, {key: sign * side}, 0.5))
    found = [one._replace(held_out=one.written and rng.random() < HELD_OUT) for one in found]
    stated = [one for one in found if one.written and one.sides and not one.held_out]
    for _ in range(PAIRS if len(stated) > 1 else 0):
        one, other = rng.sample(stated, 2)
        if not one.sides.keys() & other.sides.keys():
            joint = rng.choice((", and ", " ", "; ", ", ", " but "))
            text = f"{one.text.rstrip('.!')}{joint}{other.text}" if joint != " " else f"{one.text} {other.text}"
            found.append(Example(text, {**one.sides, **other.sides}, 0.5))
    return found


def foreign_examples(embed: Embed, dimensions: Dimensions, seed: int) -> list[Example]:
    """Statements in ten other languages: those of a language with their sides where the embedder puts at least
    :data:`MULTILINGUAL` of them nearest to their own English, as texts that state nothing where it does not, so that
    nobody's words are guessed at. A tenth of the groups of translations is held out.
    """
    rng = random.Random(seed)
    table = tomllib.loads((_FOLDER / "foreign.toml").read_text(encoding="utf-8"))
    rows: list[tuple[dict[str, int], list[str]]] = [({}, texts) for texts in table["neutral"]["none"]]
    for key, dimension in dimensions.items():
        for side, pole in ((-1, dimension.negative), (1, dimension.positive)):
            rows += [({key: side}, texts) for texts in (table.get(key, {}).get(pole.name, []) if pole else [])]
    held_out = set(rng.sample(range(len(rows)), round(HELD_OUT * len(rows))))
    english, *others = zip(*(texts for _, texts in rows), strict=True)
    own = embed(english)
    found = []
    for language in others:
        is_own = (embed(language) @ own.T).argmax(1) == np.arange(len(rows))
        understood = float(is_own.mean()) >= MULTILINGUAL
        for row, text in enumerate(language):
            found.append(Example(text, rows[row][0] if understood else {}, 2.0, True, held_out=row in held_out))
    return found


def fit_readout(
    embedder: Embedder,
    anchors: Sequence[Anchor],
    dimensions: Dimensions,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    progress: Callable[[str, float], None] = lambda what, share: None,
    out: Path | None = None,
) -> tuple[ReadOut, dict[str, Any]]:
    """Fit a read-out; give back it and how it does on what was held out.

    Args:
        embedder: whose encoder is adapted.
        anchors: the bank, for fitting and for explaining.
        dimensions: of these the style dimensions are read.
        seed: of the sentences made from qualities, of what is held out and of the training.
        epochs: passes over the examples.
        progress: told what is under way and how much of it is done.
        out: where to write it. A fit that was killed goes on where it was and comes to the same.

    Raises:
        UsageError: no dimension is of kind style, or an unfinished fit beside ``out`` is another one.
    """
    keys = tuple(key for key, dimension in dimensions.items() if dimension.kind == "style")
    if not keys:
        raise UsageError("there is no style dimension to read")
    given = [*examples(anchors, dimensions, seed), *foreign_examples(embedder, dimensions, seed)]
    targets = np.array([[one.sides.get(key, 0) for key in keys] for one in given])
    held_out = np.array([one.held_out for one in given])
    about = {"embedder": embedder.name, "seed": seed, "epochs": epochs, "texts": _digest(repr((keys, given)).encode())}
    code = _digest(*(Path(str(module)).read_bytes() for module in (__file__, adapter.__file__)))
    unfinished = Unfinished(out, {**about, "code": code}) if out else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = adapted(embedder.encoder, RANK)
        config: Any = embedder.encoder.config
        reader = Reader(encoder, config.hidden_size, len(keys))
        rest = np.flatnonzero(~held_out)
        _train(reader, embedder, [given[row] for row in rest], targets[rest], epochs, seed, progress, unfinished)
    bank = torch.from_numpy(embedder([anchor.text for anchor in anchors]))
    head = {f"head.{name}": tensor.detach() for name, tensor in reader.head.state_dict().items()}
    poles = {key: dimensions[key].poles for key in keys}
    readout = ReadOut(embedder, poles, 0.0, anchors, {**learned(encoder), **head, "anchors": bank})
    texts = [one.text for one, out in zip(given, held_out, strict=True) if out]
    readout.threshold, measured = _threshold(readout.values(texts), targets[held_out])
    counts = {"examples": len(rest), "held_out": len(texts), "anchors": len(anchors)}
    if out and unfinished:
        readout.save(out)
        unfinished.done()
    return readout, {**counts, "threshold": readout.threshold, **measured}


def _train(
    reader: Reader,
    embedder: Embedder,
    given: Sequence[Example],
    targets: NDArray[Any],
    epochs: int,
    seed: int,
    progress: Callable[[str, float], None],
    unfinished: Unfinished | None,
) -> None:
    """AdamW on the adapter and the head, cross entropy summed over dimensions; texts of like length share a batch."""
    rng = np.random.default_rng(seed)
    wanted = torch.from_numpy(targets + 1).long()
    weights = torch.tensor([one.weight for one in given])
    optimizer = torch.optim.AdamW([weight for weight in reader.parameters() if weight.requires_grad], weight_decay=0.01)
    steps = epochs * -(-len(given) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    reader.train()
    begun, done = _go_on(unfinished, reader, optimizer, schedule), 0
    for _ in range(epochs):
        order = sorted(range(len(given)), key=lambda row: (len(given[row].text) // 8, rng.random()))
        batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
        for index in rng.permutation(len(batches)):
            done += 1
            if done <= begun:
                continue
            rows = batches[index]
            logits = reader(**embedder.tokens([given[row].text for row in rows], LONGEST))
            loss = nn.functional.cross_entropy(logits.transpose(1, 2), wanted[rows], reduction="none").sum(1)
            optimizer.zero_grad()
            (loss * weights[rows]).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress("fitting", done / steps)
            if unfinished:
                unfinished.keep(lambda done=done: _state(done, reader, optimizer, schedule))  # type: ignore[misc]
    reader.eval()


def _state(done: int, reader: Reader, optimizer: Any, schedule: Any) -> dict[str, Any]:
    """All that the steps after the first ``done`` depend on."""
    return {
        "done": done,
        "weights": [weight.detach() for weight in reader.parameters() if weight.requires_grad],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
    }


def _go_on(unfinished: Unfinished | None, reader: Reader, optimizer: Any, schedule: Any) -> int:
    """Put back what was kept of an unfinished fit; the steps that it has done."""
    kept = unfinished.state() if unfinished else None
    if kept is None:
        return 0
    with torch.no_grad():
        for weight, value in zip(
            (one for one in reader.parameters() if one.requires_grad), kept["weights"], strict=True
        ):
            weight.copy_(value)
    optimizer.load_state_dict(kept["optimizer"])
    schedule.load_state_dict(kept["schedule"])
    torch.set_rng_state(kept["random"])
    return int(kept["done"])


def _digest(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:12]


def _threshold(values: NDArray[np.float64], targets: NDArray[Any]) -> tuple[float, dict[str, float]]:
    """The least threshold from 0.15 that leaves enough of what states nothing alone, and what it does to the rest."""
    nothing = (targets == 0).all(axis=1)
    largest = np.abs(values[nothing]).max(axis=1)
    threshold = float(np.clip(np.quantile(largest, LEFT_ALONE), 0.15, 0.95))
    stated = values[~nothing] * targets[~nothing]
    right = stated[targets[~nothing] != 0]
    beside = np.abs(values[~nothing])[targets[~nothing] == 0]
    return round(threshold, 3), {
        "right_side": float((right > 0).mean()),
        "right_and_clear": float((right >= threshold).mean()),
        "wrong_and_clear": float((right <= -threshold).mean()),
        "beside_the_point": float((beside >= threshold).mean()),
        "left_alone": float((largest < threshold).mean()),
    }
