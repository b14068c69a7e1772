"""A multi-objective reward model trained: scored replies in, a checkpoint out.

::

    loss = sum_ij m_ij (r_j(x_i, y_i) - s_ij)^2 / sum_ij m_ij + lm * CE(y_i | x_i)

s scores as shares of 100, m 0 where one is missing. A run's folder holds ``run.json`` (what is run), ``checkpoints/``,
the finished ``reward/``, ``metrics.json`` and, where it is asked for, ``merged/``. Kill a run and start it again with
the same arguments: it goes on.

Source: DPA, section 3.1, "Reward Modeling"; SteerLM 2 (Wang et al., 2023) for both losses. Neither prints how much the
second counts. The head begins as the ridge regression of the scores on the untrained backbone's states, which is ours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefmw.errors import UsageError
from prefmw.models import ChatModel, ModelSpec, load_chat_model
from prefmw.models.persrm import BackboneCard
from prefmw.models.reward import OBJECTIVES, RewardCard, RewardModel, load_reward, save_reward, write_merged
from prefmw.training.composed_scores import composed_scores
from prefmw.training.regression import EncodedReply, encode, predict, ridge, train_regression
from prefmw.training.runs import bars, claim, device_of, fastest_dtype, keep_freed_memory, processes
from prefmw.training.scored import Scored, read_scored

_log = logging.getLogger(__name__)

RIDGE_ROWS = 4000
"""Replies that the head begins from."""


@dataclass(frozen=True)
class Fit:
    """How it is trained; ``lm`` is the weight of the language-model loss beside the squared error."""

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-5
    batch: int = 64
    per_device: int = 4
    epochs: float = 2.0
    warmup: float = 0.03
    lm: float = 0.1


@dataclass(frozen=True)
class Corpus:
    """Replies composed of the embedded model's corpus; those held out are of its held-out questions."""

    replies: int
    held_out: int


@dataclass(frozen=True)
class RewardRecipe:
    """What is trained, on what, and how.

    ``ask`` is the card's, see :class:`prefmw.models.reward.RewardCard`. ``objectives`` are attributes as means of
    outputs, by default the paper's two where the data has theirs. ``held_out`` is the share of a data file's prompts
    that correlation is told on. Replies beyond ``max_tokens`` are left out.
    """

    name: str
    backbone: str
    seed: int = 0
    corpus: Corpus | None = None
    objectives: dict[str, list[str]] | None = None
    ask: str = ""
    fit: Fit = field(default_factory=Fit)
    held_out: float = 0.1
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        fit = self.fit
        positive = [("rank", fit.rank), ("alpha", fit.alpha), ("learning_rate", fit.learning_rate)]
        positive += [("batch", fit.batch), ("per_device", fit.per_device), ("epochs", fit.epochs)]
        for name, value in (*positive, ("max_tokens", self.max_tokens)):
            if not 0 < value < 1e9:
                raise UsageError(f"{name.replace('_', '-')} is above 0, got {value}")
        if not 0 < self.held_out < 0.5:
            raise UsageError(f"held-out is a share between 0 and 0.5, got {self.held_out:g}")
        if not (0 <= fit.lm < 1e6 and 0 <= fit.warmup < 1):
            raise UsageError("lm is 0 or more, and warmup a share below 1")


def load_reward_recipe(name: str) -> RewardRecipe:
    """A recipe by name, or by the path of a TOML file.

    Raises:
        UsageError: there is none, or it cannot be followed.
    """
    root = Path(str(files("prefmw.training"))) / "recipes" / "reward"
    path = Path(name) if name.endswith(".toml") else root / f"{name}.toml"
    parts: dict[str, Callable[..., Any]] = {"corpus": Corpus, "fit": Fit}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return RewardRecipe(**{key: parts[key](**value) if key in parts else value for key, value in table.items()})
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in root.glob("*.toml")))
        raise UsageError(f"no recipe '{name[:80]}'; there is {known}, or name a TOML file") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"the recipe '{name[:80]}' cannot be read: {error}") from error


def train_reward(
    recipe: RewardRecipe,
    out: Path,
    *,
    data: Sequence[Path] = (),
    backbone_path: Path | None = None,
    merge: bool = False,
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Train a reward model as ``recipe`` says, on its corpus or on the replies in ``data``, resuming what ``out`` holds
    of it; with ``merge`` also as one sequence classification model.

    Returns:
        The checkpoint's folder, and the metrics.

    Raises:
        UsageError: no reply is left, or ``out`` holds another run.
        ModelError: the backbone cannot be loaded, or merged.
        TrainingError: the loss is not a number.
    """
    keep_freed_memory()
    state = processes()
    parts, left_out = _parts(recipe, data)
    with state.main_process_first():
        claim(out, "run.json", _identity(recipe, parts), "a run of another recipe or of other data")
    spec = ModelSpec(recipe.backbone, path=backbone_path, device=device_of(state))
    chat = load_chat_model(spec)
    chat.module.requires_grad_(False)
    backbone = BackboneCard.of(chat)
    outputs = tuple(sorted({name for one in parts["train"] for name in one.scores}))
    card = RewardCard(recipe.name, outputs, _objectives(recipe, outputs), ask=recipe.ask, backbone=asdict(backbone))
    progress = progress and state.is_main_process
    with bars(progress) as bar:
        encoded = {
            part: _encoded(rows, card, chat, recipe, left_out, bar(f"tokenising {part}"))
            for part, rows in parts.items()
        }
        for reason, count in left_out.most_common():
            _log.warning("%d replies left out %s", count, reason)
        start = ridge(chat.module, _some(encoded["train"], recipe.seed), bar("reading"))
        begun = _agreement(card, predict(chat.module, start, encoded["held_out"]), encoded["held_out"])
    lora, head, log = train_regression(
        chat,
        start,
        encoded["train"],
        out / "checkpoints",
        **asdict(recipe.fit),
        seed=recipe.seed,
        bf16=torch.cuda.is_available() or fastest_dtype() == torch.bfloat16,
        progress=progress,
    )
    predicted = predict(chat.module, head, encoded["held_out"])
    found = _agreement(card, predicted, encoded["held_out"])
    training = {"pearson": {name: row["pearson"] for name, row in found.items()}, "replies": len(encoded["train"])}
    model = RewardModel(replace(card, training=training), "", lora, 100 * head)
    metrics = {
        "held_out": found,
        "untrained": begun,
        "replies": {part: len(rows) for part, rows in encoded.items()} | {"left_out": dict(left_out)},
        "recipe": asdict(recipe),
        "backbone": card.backbone,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "log": log,
    }
    folder = out / "reward"
    if state.is_main_process:
        save_reward(folder, model, torch.bfloat16)
        load_reward(folder)  # what cannot be read back is no result
        if merge:
            clean = load_chat_model(spec)  # the trained one has peft's layers in it
            write_merged(
                out / "merged", load_reward(folder), clean, str(backbone_path or recipe.backbone), clean.module.dtype
            )
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return folder, metrics


def _parts(recipe: RewardRecipe, data: Sequence[Path]) -> tuple[dict[str, list[Scored]], Counter[str]]:
    """Replies by part: the corpus', or the data's, whose prompts fall into one part each."""
    if recipe.corpus is not None:
        counts = {"train": recipe.corpus.replies, "held_out": recipe.corpus.held_out}
        return {
            "train": list(composed_scores("train", counts["train"], seed=recipe.seed)),
            "held_out": list(composed_scores("test", counts["held_out"], seed=recipe.seed)),
        }, Counter()
    rows, left_out = read_scored(data)
    prompts = sorted({row.messages for row in rows}, key=repr)
    random.Random(recipe.seed).shuffle(prompts)
    held = set(prompts[: max(1, round(recipe.held_out * len(prompts)))])
    if len(prompts) <= len(held):
        raise UsageError(f"{len(prompts)} different prompts are too few to hold some out; give more data")
    return {
        "train": [row for row in rows if row.messages not in held],
        "held_out": [row for row in rows if row.messages in held],
    }, left_out


def _identity(recipe: RewardRecipe, parts: dict[str, list[Scored]]) -> dict[str, Any]:
    digest = hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return {**{key: value for key, value in asdict(recipe).items() if value is not None}, "data": digest}


def _objectives(recipe: RewardRecipe, outputs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The recipe's objectives, or the paper's as far as the outputs have theirs."""
    if recipe.objectives is not None:
        return {name: tuple(parts) for name, parts in recipe.objectives.items()}
    return {name: parts for name, parts in OBJECTIVES.items() if set(parts) <= set(outputs)}


def _encoded(
    rows: Sequence[Scored],
    card: RewardCard,
    chat: ChatModel,
    recipe: RewardRecipe,
    left_out: Counter[str],
    progress: Callable[[int, int], None],
) -> list[EncodedReply]:
    room, found = min(recipe.max_tokens, chat.capacity), []
    for at, row in enumerate(rows):
        if at % 256 == 0:
            progress(at, len(rows))
        one = encode(row, card, chat)
        if len(one.ids) > room:
            left_out[f"beyond {room} tokens"] += 1
        else:
            found.append(one)
    progress(len(rows), len(rows))
    if not found:
        told = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        raise UsageError(f"no reply is left to learn from: {told or 'too few prompts'}")
    return found


def _some(rows: Sequence[EncodedReply], seed: int) -> list[EncodedReply]:
    return random.Random(f"{seed}:ridge").sample(list(rows), min(RIDGE_ROWS, len(rows)))


def _agreement(card: RewardCard, predicted: Tensor, rows: Sequence[EncodedReply]) -> dict[str, Any]:
    """Of every attribute: how many held-out replies have its scores, Pearson's correlation with what the model says,
    and the root of the mean squared error, of 100.
    """
    scores = torch.tensor([row.scores for row in rows])  # (R, k), NaN where missing
    found = {}
    for name in card.attributes:
        mix = card.mixture([name])[0]
        parts = mix > 0
        known = scores[:, parts].isfinite().all(1)
        ours = (predicted[known] @ mix).double()
        theirs = (scores[known][:, parts] @ mix[parts]).double()
        pearson: float | None = None
        if len(ours) > 1 and float(ours.std()) > 0 and float(theirs.std()) > 0:
            pearson = round(float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]), 4)
        error = 100 * float((ours - theirs).square().mean().sqrt()) if len(ours) else None
        found[name] = {"n": len(ours), "pearson": pearson, "rmse": None if error is None else round(error, 2)}
    return found
