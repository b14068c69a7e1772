"""Fits the read-out of preferences: a low-rank adapter and a head on the embedder's encoder.

It learns from the anchor bank and from ``preference_files/``: statements of many kinds for either pole, what people say
of themselves with preferences in it or none, qualities by those who like and dislike them put into sentences of either
attitude, pairs of statements joined, and texts that state nothing, the topics' questions among them. Sentences of
qualities and pairs are composed anew in every pass. A tenth of what people wrote is held out; on it the logits'
temperature is fitted, so that a value of 0.6 is right about as often as it says, and the threshold chosen, the least at
which nearly all texts that state nothing are left alone; and the rest is measured.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import tomllib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prefmw.errors import UsageError
from prefmw.models import readout as adapter
from prefmw.models.embedder import Embed, Embedder
from prefmw.models.readout import Reader, ReadOut, adapted, changes, tokens
from prefmw.preferences.anchors import Anchor
from prefmw.preferences.dimensions import Dimensions, default_dimensions
from prefmw.training.runs import fastest_dtype
from prefmw.training.topics import load_topics
from prefmw.training.unfinished import Unfinished

RANK, EPOCHS, BATCH, LEARNING_RATE, WARM_UP, CLIP = 32, 12, 64, 1.5e-3, 0.1, 1.0

FURTHER = 2
"""Passes of a fit that goes on from a read-out."""

HELD_OUT = 0.1
LEFT_ALONE = 0.95
"""Share of the held-out texts that state nothing which no dimension may take a side on: what is asked of the whole."""

MULTILINGUAL = 0.8
"""Share of a language's translations that an embedder must put nearest to their English, to be taught their sides."""

PAIRS, QUESTIONS = 4000, 2500
"""Pairs of statements about different dimensions that a pass joins, and the topics' questions that state nothing."""


_FOLDER = files("prefmw.training") / "preference_files"


class Example(NamedTuple):
    """A text and the sides it takes; ``weight`` in the loss. ``written`` by itself, not put together of qualities or of
    two others, nor a contrast, nor taken from the topics; of such alone some are ``held_out`` from the fit.
    """

    text: str
    sides: dict[str, int]
    weight: float
    written: bool = False
    held_out: bool = False


def written_examples(anchors: Sequence[Anchor], dimensions: Dimensions, seed: int) -> list[Example]:
    """What people wrote: the bank, the statements, what people say of themselves with a side or several or none, and
    what states nothing, a tenth of it held out; and contrasts, that is statements many of which differ in a few words
    and take opposite sides.
    """
    rng = random.Random(seed)
    found = [
        Example(anchor.text, {anchor.dimension: anchor.side} if anchor.dimension else {}, 2.0 - abs(anchor.side), True)
        for anchor in anchors
    ]
    found += [Example(text, {}, 2.0, True) for text in _table("neutral")["texts"]]
    for key, poles in _poles(dimensions).items():
        found += [Example(text, {key: side}, 1.0, True) for side, pole in poles.items() for text in pole["statements"]]
    shipped = _poles(dimensions).keys()
    for one in _said():
        sides = {key: side for key, side in one["sides"].items() if key in shipped}
        found.append(Example(one["text"], sides, 2.0, True))
    found = [one._replace(held_out=rng.random() < HELD_OUT) for one in found]
    for key, poles in _poles(dimensions).items():  # whose twins would be on either side of the split
        found += [Example(text, {key: side}, 1.0) for side, pole in poles.items() for text in pole["contrasts"]]
    questions = [question for topic in load_topics() for question in topic.questions]
    return found + [Example(text, {}, 1.0) for text in rng.sample(questions, QUESTIONS)]


def composed_examples(written: Sequence[Example], dimensions: Dimensions, rng: random.Random) -> list[Example]:
    """Qualities put into sentences of those who want them and who refuse them, and pairs of what is ``written``, of
    which none is held out.
    """
    found = []
    attitudes = _table("neutral")["attitudes"]
    for key, poles in _poles(dimensions).items():
        for side, pole in poles.items():
            for quality, sign in [*((q, 1) for q in pole["liked"]), *((q, -1) for q in pole["disliked"])]:
                found.append(Example(quality, {key: side}, 0.3))
                wanted = rng.sample(attitudes["positive"], 2 if sign > 0 else 1)
                refused = rng.sample(attitudes["negative"], 1 if sign > 0 else 2)
                found += [Example(form.format(x=quality), {key: side}, 0.5) for form in wanted]
                found += [Example(form.format(x=quality), {key: -side}, 0.5) for form in refused]
                other = rng.choice(poles[-side]["disliked" if sign > 0 else "liked"])
                x, y = (quality, other) if sign > 0 else (other, quality)
                compared = rng.choice(attitudes["comparative"]).format(x=x, y=y)
                found.append(Example(compared, {key: sign * side}, 0.5))
    stated = [one for one in written if one.written and one.sides and not one.held_out]
    for _ in range(PAIRS if len(stated) > 1 else 0):
        first, second = rng.sample(stated, 2)
        if not first.sides.keys() & second.sides.keys():
            joint = rng.choice((", and ", " ", "; ", ", ", " but "))
            begin = first.text if joint == " " else first.text.rstrip(".!")
            found.append(Example(f"{begin}{joint}{second.text}", {**first.sides, **second.sides}, 0.5))
    return found


def _poles(dimensions: Dimensions) -> dict[str, dict[int, dict[str, list[str]]]]:
    """What is written for the two sides of each shipped dimension that no deployment replaced by its own."""
    found = {}
    for key, dimension in dimensions.items():
        if key in default_dimensions() and dimension.negative is not None and (_FOLDER / f"{key}.toml").is_file():
            table = _table(key)
            if set(dimension.poles) == set(table):
                found[key] = {-1: table[dimension.negative.name], 1: table[dimension.positive.name]}
    return found


@functools.cache
def _said() -> list[dict[str, Any]]:
    lines = (_FOLDER / "said.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@functools.cache
def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def foreign_examples(embed: Embed, dimensions: Dimensions, seed: int) -> list[Example]:
    """Statements in ten other languages: those of a language with their sides where the embedder puts at least
    :data:`MULTILINGUAL` of them nearest to their own English, as texts that state nothing where it does not, so that
    nobody's words are guessed at. A tenth of the groups of translations is held out.
    """
    rng = random.Random(seed)
    table = _table("foreign")
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
    start: ReadOut | None = None,
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
        start: a read-out of the same dimensions to go on from, with further texts say; otherwise from nothing.
        progress: told what is under way and how much of it is done.
        out: where to write it. A fit that was killed goes on where it was and comes to the same.

    Raises:
        UsageError: no dimension is of kind style, ``start`` reads others, or an unfinished fit beside ``out`` is
            another one.
    """
    keys = tuple(key for key, dimension in dimensions.items() if dimension.kind == "style")
    if not keys:
        raise UsageError("there is no style dimension to read")
    poles = {key: dimensions[key].poles for key in keys}
    if start and dict(zip(start.dimensions, start.poles, strict=True)) != poles:
        raise UsageError(
            f"the read-out to start from reads {', '.join(start.dimensions)}, and this fit {', '.join(keys)}; leave "
            "out --start, or name one of the same dimensions and poles"
        )
    written = [*written_examples(anchors, dimensions, seed), *foreign_examples(embedder, dimensions, seed)]
    held_out = [one for one in written if one.held_out]
    rest = [one for one in written if not one.held_out]

    def epoch(number: int) -> tuple[list[Example], Tensor]:
        given = [*rest, *composed_examples(rest, dimensions, random.Random(f"{seed} {number}"))]
        return given, _targets(given, keys)

    dtype = fastest_dtype()
    about = {"embedder": embedder.name, "seed": seed, "epochs": epochs, "dtype": str(dtype)}
    about["start"] = start.version() if start else None
    texts = _digest(repr((keys, written, epoch(0)[0])).encode())
    code = _digest(*(Path(str(module)).read_bytes() for module in (__file__, adapter.__file__)))
    unfinished = Unfinished(out, {**about, "texts": texts, "code": code}) if out else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = adapted(embedder.encoder, RANK)
        config: Any = embedder.encoder.config
        reader = Reader(encoder, config.hidden_size, len(keys))
        if start:
            start.continued(reader)
        _train(reader, embedder, epoch, epochs, seed, dtype, progress, unfinished)
    asked, wanted = [one.text for one in held_out], _targets(held_out, keys)
    with torch.inference_mode():
        logits = [reader(**tokens(embedder, asked[at : at + BATCH])) for at in range(0, len(asked), BATCH)]
    temperature = _temperature(torch.cat(logits), wanted)
    head = {f"head.{name}": tensor.detach() / temperature for name, tensor in reader.head.state_dict().items()}
    learned = {name: value.detach() for name, value in changes(encoder).items()}
    tensors = {**learned, **head}
    reading = ReadOut(embedder, poles, 0.0, (), {**tensors, "anchors": torch.zeros(0, config.hidden_size)})
    states = torch.from_numpy(reading.read([anchor.text for anchor in anchors]).vectors)
    readout = ReadOut(embedder, poles, 0.0, anchors, {**tensors, "anchors": states})
    readout.threshold, measured = _threshold(readout.read(asked).values, wanted.numpy())
    counts = {"examples": len(epoch(0)[0]), "held_out": len(held_out), "anchors": len(anchors)}
    if out and unfinished:
        readout.save(out)
        unfinished.done()
    return readout, {**counts, "temperature": round(temperature, 3), "threshold": readout.threshold, **measured}


def _targets(given: Sequence[Example], keys: Sequence[str]) -> Tensor:
    """The sides that N texts take, (N, K), each -1, 0 or 1."""
    return torch.tensor([[one.sides.get(key, 0) for key in keys] for one in given])


def _train(
    reader: Reader,
    embedder: Embedder,
    epoch: Callable[[int], tuple[list[Example], Tensor]],
    epochs: int,
    seed: int,
    dtype: torch.dtype,
    progress: Callable[[str, float], None],
    unfinished: Unfinished | None,
) -> None:
    """AdamW on the adapter and the head, cross entropy summed over dimensions; texts of like length share a batch."""
    rng = np.random.default_rng(seed)
    weights = [weight for weight in reader.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.01)
    sizes = [-(-len(epoch(number)[0]) // BATCH) for number in range(epochs)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=sum(sizes), pct_start=WARM_UP)
    reader.train()
    begun, done = _go_on(unfinished, reader, optimizer, schedule), 0
    for number in range(epochs):
        given, targets = epoch(number)
        order = sorted(range(len(given)), key=lambda row: (len(given[row].text) // 8, rng.random()))
        batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
        for index in rng.permutation(len(batches)):
            done += 1
            if done <= begun:
                continue
            rows = batches[index]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = reader(**tokens(embedder, [given[row].text for row in rows]))
            losses = nn.functional.cross_entropy(
                logits.float().transpose(1, 2), targets[rows] + 1, reduction="none"
            ).sum(1)
            optimizer.zero_grad()
            (losses * torch.tensor([given[row].weight for row in rows])).mean().backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            schedule.step()
            progress("fitting", done / sum(sizes))
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


def _temperature(logits: Tensor, targets: Tensor) -> float:
    """By what logits (N, K, 3) are divided to be likeliest to give these targets (N, K).

    Source: Guo et al., "On Calibration of Modern Neural Networks", section 4.2.
    """
    tried = torch.logspace(-1, 1, 101, dtype=torch.float64)
    losses = [nn.functional.cross_entropy((logits.double() / one).transpose(1, 2), targets + 1) for one in tried]
    return float(tried[int(torch.stack(losses).argmin())])


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
