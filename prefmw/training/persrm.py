"""A PersRM trained in two stages: pairs in, a checkpoint out (Algorithm 1 of the PAD paper).

A run's folder holds ``run.json`` (what is run), ``stage1/`` and ``stage2/`` with their checkpoints, the finished
``persrm/``, ``metrics.json`` and ``curves.png``. Kill a run and start it again with the same arguments: it goes on.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefmw.errors import UsageError
from prefmw.models import ChatModel, ModelSpec, load_chat_model
from prefmw.models.persrm import BackboneCard, Card, PersRM, Prefix, load_persrm, meaning_of, save_persrm
from prefmw.training.composed_pairs import composed_pairs
from prefmw.training.pair_reading import EncodedPair, encode_pairs, pair_log_probabilities
from prefmw.training.pairs import Pair, read_pairs
from prefmw.training.runs import bars, claim, device_of, fastest_dtype, keep_freed_memory, lora_of, processes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lora:
    """Stage 1: the paper's numbers (Appendix A.2), and DPO's usual beta."""

    rank: int = 8
    alpha: int = 16
    learning_rate: float = 5e-6
    batch: int = 128
    per_device: int = 4
    epochs: float = 3.0
    warmup: float = 0.0
    beta: float = 0.1


@dataclass(frozen=True)
class Head:
    """Stage 2: W, with ``penalty`` times its squared norm in the loss; ``cache_mb`` of hidden states are kept.

    ``learning_rate`` is about what a step moves w_p by: Adam moves every one of the D numbers that make up one of w_p's
    by its own rate, so that is this one divided by D.
    """

    learning_rate: float = 0.02
    batch: int = 32
    epochs: float = 3.0
    penalty: float = 1e-3
    cache_mb: int = 4096


@dataclass(frozen=True)
class Corpus:
    """Pairs composed of the embedded model's corpus."""

    pairs: int
    dev: int
    held_out: int
    unseen: float


@dataclass(frozen=True)
class PersRMRecipe:
    """What is trained, on what, and how.

    ``held_out`` is the share of a data file's prompts that accuracy is told on; half as many more choose among stage
    2's epochs. ``preference`` stands in for the one that rows do not name. Pairs beyond ``max_tokens`` are left out.
    """

    name: str
    backbone: str
    seed: int = 0
    corpus: Corpus | None = None
    prefix: Prefix = field(default_factory=Prefix)
    lora: Lora = field(default_factory=Lora)
    head: Head = field(default_factory=Head)
    preference: str | None = None
    held_out: float = 0.1
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        positive = [("epochs", self.lora.epochs), ("epochs", self.head.epochs), ("rank", self.lora.rank)]
        positive += [("batch", self.lora.batch), ("per_device", self.lora.per_device), ("batch", self.head.batch)]
        positive += [("learning_rate", self.lora.learning_rate), ("learning_rate", self.head.learning_rate)]
        positive += [("beta", self.lora.beta), ("alpha", self.lora.alpha), ("max_tokens", self.max_tokens)]
        for name, value in positive:
            if not 0 < value < 1e9:
                raise UsageError(f"{name.replace('_', '-')} is above 0, got {value}")
        if not 0 < self.held_out < 0.5:
            raise UsageError(f"held-out is a share between 0 and 0.5, got {self.held_out:g}")
        if not (self.head.penalty >= 0 and self.head.cache_mb >= 0 and 0 <= self.lora.warmup < 1):
            raise UsageError("penalty and cache-mb are 0 or more, and warmup a share below 1")


def load_persrm_recipe(name: str) -> PersRMRecipe:
    """A recipe by name, or by the path of a TOML file.

    Raises:
        UsageError: there is none, or it cannot be followed.
    """
    root = Path(str(files("prefmw.training"))) / "recipes" / "persrm"
    path = Path(name) if name.endswith(".toml") else root / f"{name}.toml"
    parts = {"corpus": Corpus, "prefix": Prefix, "lora": Lora, "head": Head}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return PersRMRecipe(**{key: parts[key](**value) if key in parts else value for key, value in table.items()})
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in root.glob("*.toml")))
        raise UsageError(f"no recipe '{name[:80]}'; there is {known}, or name a TOML file") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"the recipe '{name[:80]}' cannot be read: {error}") from error


@dataclass(frozen=True)
class _Data:
    """Pairs to train on, to choose an epoch by and to report on, with the preference texts that they number."""

    train: list[EncodedPair]
    dev: list[EncodedPair]
    held_out: list[EncodedPair]
    preferences: list[str]
    left_out: Counter[str]


def train_persrm(
    recipe: PersRMRecipe,
    out: Path,
    *,
    data: Sequence[Path] = (),
    backbone_path: Path | None = None,
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Train a PersRM as ``recipe`` says, on its corpus or on the pairs in ``data``, resuming what ``out`` holds of it.

    Returns:
        The checkpoint's folder, and the metrics.

    Raises:
        UsageError: no pair is left, or ``out`` holds another run.
        ModelError: the backbone cannot be loaded.
        TrainingError: the loss is not a number.
    """
    from prefmw.training.dpo import train_lora
    from prefmw.training.preference_head import train_head

    keep_freed_memory()
    state = processes()
    pairs, left_out = _pairs(recipe, data)
    with state.main_process_first():
        claim(out, "run.json", _identity(recipe, pairs), "a run of another recipe or of other data")
    chat = load_chat_model(ModelSpec(recipe.backbone, path=backbone_path, device=device_of(state)))
    chat.module.requires_grad_(False)
    progress = progress and state.is_main_process
    with bars(progress) as bar:
        found = _encoded(pairs, left_out, chat, recipe, bar("tokenising"))
        for count, reason in ((count, reason) for reason, count in found.left_out.most_common()):
            _log.warning("%d rows left out %s", count, reason)
        with state.main_process_first():
            raw = _meanings(found.preferences, chat, out, bar("reading preferences"))
        numbers = sorted({pair.preference for pair in found.train})
        mean, deviation = raw[numbers].mean(0), raw[numbers].std(0, correction=0).clamp(min=1e-6)
        with state.main_process_first():
            references = _references(found, chat, out, bar("reference"))
    metrics = {"pairs": _counts(found), "untrained": _untrained(found.held_out, references["held_out"])}
    lora_settings = asdict(recipe.lora)
    on_gpu = torch.cuda.is_available()
    stage1 = out / "stage1" / "persrm"
    card = Card(recipe.name, BackboneCard.of(chat), recipe.prefix, head="none")
    model, log1 = train_lora(
        chat,
        found.train,
        references["train"],
        out / "stage1",
        **lora_settings,
        seed=recipe.seed,
        bf16=on_gpu or fastest_dtype() == torch.bfloat16,
        progress=progress,
    )
    if state.is_main_process:
        save_persrm(stage1, PersRM(card, "", lora_of(model)))
    policy = model.get_base_model().requires_grad_(False)
    meanings = (raw - mean) / deviation

    def margins(part: str, encoded: Sequence[EncodedPair], weight: Tensor | None) -> Tensor:
        scales = None if weight is None else 1 + meanings @ weight.T
        ratios = pair_log_probabilities(policy, encoded, scales) - references[part]
        return recipe.lora.beta * (ratios[:, 0] - ratios[:, 1])

    def judge(weight: Tensor) -> tuple[float, float]:
        found_margins = margins("dev", found.dev, weight)
        loss = -torch.nn.functional.logsigmoid(found_margins).mean()
        return _share(found_margins), round(float(loss), 5)

    metrics["stage1"] = _accuracies(found.held_out, margins("held_out", found.held_out, None))
    weight, log2, about = train_head(
        policy,
        found.train,
        references["train"],
        meanings,
        out / "stage2",
        judge=judge,
        beta=recipe.lora.beta,
        penalty=recipe.head.penalty,
        learning_rate=recipe.head.learning_rate / card.backbone.hidden_size,
        epochs=recipe.head.epochs,
        batch=recipe.head.batch,
        budget=recipe.head.cache_mb << 20,
        seed=recipe.seed,
        progress=progress,
    )
    metrics["stage2"] = _accuracies(found.held_out, margins("held_out", found.held_out, weight)) | about
    training = {**asdict(recipe), "held_out_accuracy": metrics["stage2"]["accuracy"], "pairs": len(found.train)}
    persrm = PersRM(replace(card, head="scale", training=_plain(training)), "", lora_of(model), weight, mean, deviation)
    folder = out / "persrm"
    whole = {
        **metrics,
        "recipe": _plain(asdict(recipe)),
        "backbone": asdict(card.backbone),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "log": {"stage1": log1, "stage2": log2},
    }
    if state.is_main_process:
        save_persrm(folder, persrm, torch.bfloat16)
        load_persrm(folder)  # what cannot be read back is no result
        (out / "metrics.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        _plot(whole, out / "curves.png")
    return folder, whole


def _pairs(recipe: PersRMRecipe, data: Sequence[Path]) -> tuple[dict[str, list[Pair]], Counter[str]]:
    """Pairs by part: the corpus', or the data's, whose prompts fall into one part each."""
    if recipe.corpus is not None:
        counts = {"train": recipe.corpus.pairs, "dev": recipe.corpus.dev, "held_out": recipe.corpus.held_out}
        splits = {"train": "train", "dev": "dev", "held_out": "test"}
        return {
            part: list(composed_pairs(splits[part], counts[part], seed=recipe.seed, unseen=recipe.corpus.unseen))  # type: ignore[arg-type]
            for part in counts
        }, Counter()
    pairs, left_out = read_pairs(data, recipe.preference)
    prompts = sorted({pair.messages for pair in pairs}, key=repr)
    random.Random(recipe.seed).shuffle(prompts)
    held, dev = (max(1, round(share * len(prompts))) for share in (recipe.held_out, recipe.held_out / 2))
    if len(prompts) < held + dev + 1:
        raise UsageError(f"{len(prompts)} different prompts are too few to hold some out; give more data")
    parts = {
        prompt: "held_out" if at < held else "dev" if at < held + dev else "train" for at, prompt in enumerate(prompts)
    }
    found: dict[str, list[Pair]] = {"train": [], "dev": [], "held_out": []}
    for pair in pairs:
        found[parts[pair.messages]].append(pair)
    return found, left_out


def _identity(recipe: PersRMRecipe, pairs: dict[str, list[Pair]]) -> dict[str, Any]:
    digest = hashlib.sha256(repr(pairs).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return {**_plain(asdict(recipe)), "data": digest}


def _encoded(
    pairs: dict[str, list[Pair]],
    left_out: Counter[str],
    chat: ChatModel,
    recipe: PersRMRecipe,
    progress: Callable[[int, int], None],
) -> _Data:
    total, done = sum(map(len, pairs.values())), 0
    preferences: dict[str, int] = {}
    encoded: dict[str, list[EncodedPair]] = {part: [] for part in pairs}
    for part, some in pairs.items():
        for at in range(0, len(some), 256):
            chunk = some[at : at + 256]
            kept, beyond = encode_pairs(chunk, chat, recipe.prefix, min(recipe.max_tokens, chat.capacity), preferences)
            encoded[part] += kept
            left_out += beyond
            done += len(chunk)
            progress(done, total)
    for part, left in encoded.items():
        if not left:
            told = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common())
            raise UsageError(f"no pair is left in the part '{part}': {told or 'too few prompts'}")
    return _Data(encoded["train"], encoded["dev"], encoded["held_out"], list(preferences), left_out)


def _meanings(texts: Sequence[str], chat: ChatModel, out: Path, progress: Callable[[int, int], None]) -> Tensor:
    """e(p) of every preference text before standardising, (P, D); of an earlier start, where there was one."""
    file = out / "preferences.safetensors"
    if not file.is_file():
        found = []
        for at, text in enumerate(texts):
            meaning = meaning_of(text, chat)
            assert meaning is not None  # an empty preference is no pair's
            found.append(meaning)
            progress(at + 1, len(texts))
        _write(file, {"meanings": torch.stack(found)})
    return load_file(file)["meanings"]


def _references(data: _Data, chat: ChatModel, out: Path, progress: Callable[[int, int], None]) -> dict[str, Tensor]:
    """log pi_ref of every pair, (pairs, 2) by part; of an earlier start, where there was one."""
    file = out / "references.safetensors"
    parts = {"train": data.train, "dev": data.dev, "held_out": data.held_out}
    if not file.is_file():
        total, done, found = sum(map(len, parts.values())), 0, {}
        for part, pairs in parts.items():

            def advance(count: int) -> None:
                nonlocal done
                done += count
                progress(done, total)

            found[part] = pair_log_probabilities(chat.module, pairs, None, advance)
        _write(file, found)
    return dict(load_file(file))


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    unfinished = file.with_suffix(".unfinished")
    save_file(tensors, unfinished)
    unfinished.replace(file)


def _share(margins: Tensor) -> float:
    """The share of positive margins, a tie counting half."""
    return round(float((margins > 0).float().mean() + (margins == 0).float().mean() / 2), 4)


def _accuracies(pairs: Sequence[EncodedPair], margins: Tensor) -> dict[str, Any]:
    """Of all pairs, and of each group of them."""
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    found: dict[str, Any] = {"n": len(pairs), "accuracy": _share(margins), "loss": round(float(loss), 5)}
    for group in sorted({pair.group for pair in pairs} - {""}):
        chosen = torch.tensor([pair.group == group for pair in pairs])
        found[f"accuracy_{group}"], found[f"n_{group}"] = _share(margins[chosen]), int(chosen.sum())
    return found


def _untrained(pairs: Sequence[EncodedPair], references: Tensor) -> dict[str, Any]:
    """What telling pairs apart takes without any training: the backbone's own likelihood of the replies behind the
    preference's prefix, whole and by the token, and the longer reply.
    """
    lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs]).float()

    def accuracy(values: Tensor) -> float:
        return _share(values[:, 0] - values[:, 1])

    return {
        "likelihood": accuracy(references),
        "likelihood_per_token": accuracy(references / lengths),
        "longer": accuracy(lengths),
        "shorter": accuracy(-lengths),
    }


def _counts(data: _Data) -> dict[str, Any]:
    return {
        "train": len(data.train),
        "dev": len(data.dev),
        "held_out": len(data.held_out),
        "preferences": len(data.preferences),
        "left_out": dict(data.left_out),
    }


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _plot(metrics: dict[str, Any], path: Path) -> None:
    """Loss over the steps of both stages, and stage 2's held-out accuracy by epoch."""
    try:
        import matplotlib
    except ImportError:
        _log.warning("no curves were drawn: matplotlib is not installed (pip install 'prefmw[eval]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    for place, stage in enumerate(("stage1", "stage2")):
        rows = [row for row in metrics["log"][stage] if "loss" in row]
        axes[place].plot([row["step"] for row in rows], [row["loss"] for row in rows])
        axes[place].set(title=f"stage {place + 1}", xlabel="step", ylabel="loss, nats")
    epochs = metrics["stage2"]["epochs"]
    axes[2].plot([row["epoch"] for row in epochs], [row["accuracy"] for row in epochs], marker="o")
    axes[2].set(title="stage 2, development pairs", xlabel="epoch", ylabel="accuracy")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
