"""Fits the read-out of preferences: statements whose side is known, embedded, one hidden layer, three outputs each.

Beside the anchor bank it learns from ``preference_files/``: statements of many kinds for either pole, qualities by
those who like and dislike them put into sentences of either attitude, pairs of statements joined, and texts that state
nothing. The threshold is chosen by cross-validation: the least at which nearly all texts that state nothing are left
alone.
"""

from __future__ import annotations

import random
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prefmw.preferences.anchors import Anchor
from prefmw.preferences.dimensions import Dimensions
from prefmw.preferences.readout import Embed, ReadOut, features, words_of

WORDS = 500
"""Words that the read-out looks for: the most frequent of its statements."""

HIDDEN = 128
MODELS = 3
"""Networks whose outputs are averaged; side by side they are one of three times the width."""

EPOCHS, BATCH, LEARNING_RATE, DROPOUT = 10, 256, 2e-3, 0.4
FOLDS = 4
LEFT_ALONE = 0.97
"""Share of the texts that state nothing which no dimension may take a side on."""

PAIRS = 6000
"""Pairs of statements about different dimensions, joined."""


class Example(NamedTuple):
    """A text and the sides it takes; ``weight`` in the loss. Only what a person wrote by hand is ``judged``."""

    text: str
    sides: dict[str, int]
    weight: float
    judged: bool


def examples(anchors: Sequence[Anchor], dimensions: Dimensions, seed: int) -> list[Example]:
    """Every text to fit on."""
    rng = random.Random(seed)
    found = [
        Example(anchor.text, {anchor.dimension: anchor.side} if anchor.dimension else {}, 2.0 - abs(anchor.side), True)
        for anchor in anchors
    ]
    folder = files("prefmw.training") / "preference_files"
    neutral = tomllib.loads((folder / "neutral.toml").read_text(encoding="utf-8"))
    found += [Example(text, {}, 2.0, True) for text in neutral["texts"]]
    attitudes = neutral["attitudes"]
    for key, dimension in dimensions.items():
        if not (file := folder / f"{key}.toml").is_file() or dimension.negative is None:
            continue
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        named = {-1: table[dimension.negative.name], 1: table[dimension.positive.name]}
        for side, pole in named.items():
            found += [Example(text, {key: side}, 1.0, True) for text in pole["statements"]]
            for quality, sign in [*((q, 1) for q in pole["liked"]), *((q, -1) for q in pole["disliked"])]:
                found.append(Example(quality, {key: side}, 0.3, False))
                wanted = rng.sample(attitudes["positive"], 2 if sign > 0 else 1)
                refused = rng.sample(attitudes["negative"], 1 if sign > 0 else 2)
                found += [Example(form.format(x=quality), {key: side}, 0.5, False) for form in wanted]
                found += [Example(form.format(x=quality), {key: -side}, 0.5, False) for form in refused]
                other = rng.choice(named[-side]["disliked" if sign > 0 else "liked"])
                x, y = (quality, other) if sign > 0 else (other, quality)
                compared = rng.choice(attitudes["comparative"]).format(x=x, y=y)
                found.append(Example(compared, {key: sign * side}, 0.5, False))
    stated = [one for one in found if one.judged and one.sides]
    for _ in range(PAIRS if stated else 0):
        one, other = rng.sample(stated, 2)
        if not one.sides.keys() & other.sides.keys():
            joint = rng.choice((", and ", " ", "; ", ", ", " but "))
            text = f"{one.text.rstrip('.!')}{joint}{other.text}" if joint != " " else f"{one.text} {other.text}"
            found.append(Example(text, {**one.sides, **other.sides}, 0.5, False))
    return found


def fit_readout(
    embed: Embed,
    embedder: str,
    anchors: Sequence[Anchor],
    dimensions: Dimensions,
    *,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[ReadOut, dict[str, Any]]:
    """Fit a read-out; give back it and what cross-validation says of it.

    Args:
        embed: texts to unit vectors.
        embedder: its name, kept with the read-out.
        anchors: the bank, for fitting and for explaining.
        dimensions: the style dimensions of it are read.
        seed: of the sentences made from qualities, the folds and the networks.
        progress: told what is under way and how much of it is done.
    """
    keys = tuple(key for key, dimension in dimensions.items() if dimension.kind == "style")
    given = examples(anchors, dimensions, seed)
    counts = Counter(word for one in given if one.judged for word in set(words_of(one.text)))
    words = tuple(word for word, _ in counts.most_common(WORDS))
    seen = _seen(given, embed, words, progress)
    sides = np.array([[one.sides.get(key, 0) for key in keys] for one in given])
    weights = np.array([one.weight for one in given], dtype=np.float32)
    judged = np.array([one.judged for one in given])
    folds = np.where(judged, np.random.default_rng(seed).integers(FOLDS, size=len(given)), -1)
    values = np.zeros(sides.shape)
    for fold in range(FOLDS):
        progress("cross-validating", fold / FOLDS)
        held_out = folds == fold
        layers = _fit(seen[~held_out], sides[~held_out], weights[~held_out], seed + fold, models=1)
        values[held_out] = _read(layers, seen[held_out], embedder, keys, words)
    threshold, measured = _threshold(values[judged], sides[judged])
    progress("fitting", 0.0)
    fitted = _fit(seen, sides, weights, seed, models=MODELS)
    bank = embed([anchor.text for anchor in anchors])
    return ReadOut(embedder, keys, words, threshold, fitted, bank), {
        "examples": len(given),
        "anchors": len(anchors),
        "threshold": threshold,
        **measured,
    }


def _seen(
    given: Sequence[Example], embed: Embed, words: Sequence[str], progress: Callable[[str, float], None]
) -> NDArray[np.float32]:
    parts = []
    for at in range(0, len(given), 1000):
        progress("embedding", at / len(given))
        parts.append(features([one.text for one in given[at : at + 1000]], embed, words))
    return np.concatenate(parts)


def _fit(
    seen: NDArray[np.float32], sides: NDArray[Any], weights: NDArray[np.float32], seed: int, *, models: int
) -> dict[str, NDArray[np.float32]]:
    """Networks of one hidden layer, side by side: (F, models H) and (models H, 3 K)."""
    trained = [_network(seen, sides, weights, seed + 100 * index) for index in range(models)]
    return {
        "hidden": np.concatenate([hidden.weight.detach().numpy().T for hidden, _ in trained], axis=1),
        "hidden_bias": np.concatenate([hidden.bias.detach().numpy() for hidden, _ in trained]),
        "output": np.concatenate([output.weight.detach().numpy().T for _, output in trained]) / np.float32(models),
        "output_bias": np.mean([output.bias.detach().numpy() for _, output in trained], axis=0, dtype=np.float32),
    }


def _network(
    seen: NDArray[np.float32], sides: NDArray[Any], weights: NDArray[np.float32], seed: int
) -> tuple[nn.Linear, nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    count = sides.shape[1]
    x, y, w = torch.from_numpy(seen), torch.from_numpy(sides + 1).long(), torch.from_numpy(weights)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden, output = nn.Linear(x.shape[1], HIDDEN), nn.Linear(HIDDEN, 3 * count)
        optimizer = torch.optim.AdamW([*hidden.parameters(), *output.parameters()], weight_decay=1e-3)
        steps = EPOCHS * (len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(EPOCHS):
            order = torch.randperm(len(x), generator=generator)
            for rows in order[: len(x) // BATCH * BATCH].view(-1, BATCH):
                inner = nn.functional.dropout(torch.relu(hidden(x[rows])), DROPOUT)
                logits = output(inner).view(-1, count, 3).transpose(1, 2)
                loss = nn.functional.cross_entropy(logits, y[rows], reduction="none").sum(1)
                optimizer.zero_grad()
                (loss * w[rows]).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return hidden, output


def _read(
    layers: dict[str, NDArray[np.float32]],
    seen: NDArray[np.float32],
    embedder: str,
    keys: tuple[str, ...],
    words: tuple[str, ...],
) -> NDArray[np.float64]:
    return ReadOut(embedder, keys, words, 0.0, layers, np.zeros((0, 0), dtype=np.float32)).read(seen)


def _threshold(values: NDArray[np.float64], sides: NDArray[Any]) -> tuple[float, dict[str, float]]:
    """The least threshold from 0.15 that leaves enough of what states nothing alone, and what it does to the rest."""
    nothing = (sides == 0).all(axis=1)
    largest = np.abs(values[nothing]).max(axis=1)
    threshold = float(np.clip(np.quantile(largest, LEFT_ALONE), 0.15, 0.95))
    stated = values[~nothing] * sides[~nothing]
    right = stated[sides[~nothing] != 0]
    beside = np.abs(values[~nothing])[sides[~nothing] == 0]
    return round(threshold, 3), {
        "right_side": float((right > 0).mean()),
        "right_and_clear": float((right >= threshold).mean()),
        "wrong_and_clear": float((right <= -threshold).mean()),
        "beside_the_point": float((beside >= threshold).mean()),
        "left_alone": float((largest < threshold).mean()),
    }
