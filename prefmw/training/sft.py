"""Supervised fine-tuning from nothing: composes the corpus, learns a tokenizer, trains the embedded chat model.

A recipe and the corpus' digest say what is trained. Kill a run and start it again with the same recipe and folder: it
goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prefmw.errors import ModelNotFoundError, UsageError
from prefmw.models.embedder import Embedder
from prefmw.training.composer import Chat, Composer
from prefmw.training.guide import Guide, Sources, begin_embeddings
from prefmw.training.optimizer import MuonWithAdamW
from prefmw.training.runs import Bar, claim, fastest_dtype, keep_freed_memory, last_whole_checkpoint
from prefmw.training.tokenizer import END, PAD, encode_chat, train_tokenizer

IGNORED = -100
"""The label of a token that is not learned, as PyTorch's cross entropy has it."""


SHAPE_STEP = 32
"""Lengths are rounded up to multiples of this in bf16: oneDNN compiles its products anew for every shape it meets."""

_COMPOSING = ("composer", "styles", "topics", "tokenizer")
"""The modules that decide what is in the corpus."""

EAGER = 400
"""Tokens up to which plain products beat PyTorch's fused attention on a CPU, whose backward pass is slow."""

_WHOLE, _NUMBER = (int,), (int, float)
_VALUES: dict[str, dict[str, tuple[tuple[type, ...], float, float]]] = {
    "corpus": {
        "short_chats": (_WHOLE, 0, 1e8),
        "chats": (_WHOLE, 0, 1e8),
        "held_out": (_WHOLE, 1, 1e6),
        "follow_rate": (_NUMBER, 0, 1),
    },
    "tokenizer": {"vocabulary": (_WHOLE, 300, 1e6), "chats": (_WHOLE, 1, 1e8)},
    "model": {
        "hidden_size": (_WHOLE, 1, 1e5),
        "intermediate_size": (_WHOLE, 1, 1e6),
        "num_hidden_layers": (_WHOLE, 1, 1000),
        "num_attention_heads": (_WHOLE, 1, 1000),
        "num_key_value_heads": (_WHOLE, 1, 1000),
        "max_position_embeddings": (_WHOLE, 16, 1e6),
    },
    "optimizer": {
        "learning_rate": (_NUMBER, 1e-9, 1),
        "warmup_steps": (_WHOLE, 0, 1e7),
        "weight_decay": (_NUMBER, 0, 1),
        "beta2": (_NUMBER, 0, 0.999999),
        "batch_tokens": (_WHOLE, 64, 1e7),
        "epochs": (_WHOLE, 1, 1000),
    },
    "guide": {
        "embeddings": (_NUMBER, 0, 100),
        "layer": (_WHOLE, 1, 1000),
        "meaning": (_NUMBER, 0, 100),
        "labels": (_NUMBER, 0, 100),
    },
}
"""What a recipe's tables hold: types, and the lowest and highest value."""

SAVE_STEPS = 200
"""Steps between two checkpoints."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how; see ``recipes/tiny.toml``.

    ``model`` is a shape to start from nothing with, or ``start``, an embedded model to go on from with its tokenizer.
    ``guide`` is :mod:`prefmw.training.guide`'s; without it the model learns from the next token alone.
    """

    name: str
    seed: int
    corpus: dict[str, Any]
    tokenizer: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    guide: dict[str, Any] = field(default_factory=dict)


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or by the path of a TOML file.

    Raises:
        UsageError: there is none, it lacks a part, or a value is out of range.
    """
    path = Path(name) if name.endswith(".toml") else Path(str(files("prefmw.training"))) / "recipes" / f"{name}.toml"
    try:
        recipe = Recipe(**tomllib.loads(path.read_text(encoding="utf-8")))
        _check(recipe)
    except OSError as error:
        known = sorted(file.stem for file in path.parent.glob("*.toml")) if not name.endswith(".toml") else []
        hint = f"; there is {', '.join(known)}" if known else ""
        raise UsageError(f"no recipe '{name[:80]}'{hint}, or name a TOML file") from error
    except (ValueError, TypeError) as error:  # of TOML and of text among them
        raise UsageError(f"the recipe '{name[:80]}' cannot be read: {error}") from error
    return recipe


def _check(recipe: Recipe) -> None:
    """Raise TypeError or ValueError for a recipe that cannot be followed."""
    if not isinstance(recipe.seed, int) or not 0 <= recipe.seed < 2**32:
        raise ValueError(f"seed is a whole number from 0 to {2**32 - 1}, got {recipe.seed!r}")
    goes_on = "start" in recipe.model
    if recipe.guide and goes_on:
        raise TypeError("[guide] begins a model; one that goes on from another has none")
    texts = {("model", "start"): goes_on, ("guide", "embedder"): bool(recipe.guide)}
    for part, values in _VALUES.items():
        table = getattr(recipe, part)
        if not isinstance(table, dict):
            raise TypeError(f"[{part}] is a table")
        needed = set() if (part == "guide" and not table) or (goes_on and part in ("tokenizer", "model")) else {*values}
        needed |= {key for (owner, key), is_needed in texts.items() if owner == part and is_needed}
        if missing := sorted(needed - set(table)):
            raise TypeError(f"[{part}] lacks {', '.join(missing)}")
        if unknown := sorted(set(table) - needed):
            raise TypeError(f"[{part}] has no {', '.join(unknown)}")
        for key in needed & set(values):
            kinds, low, high = values[key]
            value = table[key]
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= table[key] <= high:
                what = "a whole number" if kinds == _WHOLE else "a number"
                raise ValueError(f"[{part}] {key} is {what} from {low:g} to {high:g}, got {value!r}")
    if recipe.corpus["short_chats"] + recipe.corpus["chats"] == 0:
        raise ValueError("[corpus] has no chats")
    if recipe.guide and recipe.guide["layer"] > recipe.model["num_hidden_layers"]:
        raise ValueError(f"[guide] reads layer {recipe.guide['layer']}, which the model has not")
    if not goes_on:
        shape = recipe.model
        if shape["hidden_size"] % (2 * shape["num_attention_heads"]):
            raise ValueError("[model] hidden_size is a multiple of twice num_attention_heads")
        if shape["num_attention_heads"] % shape["num_key_value_heads"]:
            raise ValueError("[model] num_attention_heads is a multiple of num_key_value_heads")


def train_sft(recipe: Recipe, out: Path, *, progress: bool = True) -> tuple[Path, dict[str, Any]]:
    """Make the model that ``recipe`` describes, resuming what ``out`` holds of it.

    ``out`` gets ``recipe.json``, ``checkpoints/`` while it trains, ``metrics.json`` and the finished ``model/``, bf16
    safetensors that plain transformers loads.

    Returns:
        The folder of the finished model, and the metrics.

    Raises:
        UsageError: ``out`` holds a run of another recipe.
        ModelNotFoundError: the model to start from is not there.
        MissingExtraError: the guide's embedder is not installed.
    """
    keep_freed_memory()
    start = Path(str(files("prefmw"))) / "assets" / recipe.model["start"] if "start" in recipe.model else None
    if start and not (start / "config.json").is_file():
        raise ModelNotFoundError(f"the recipe goes on from '{start.name}', which is not in this installation")
    embed = Embedder(recipe.guide["embedder"]) if recipe.guide else None
    if embed:
        embed(["."])  # what is not installed is told before anything is begun
    digest = corpus_digest()
    claim(out, "recipe.json", {**asdict(recipe), "corpus_digest": digest}, "a run of another recipe or corpus")
    (out / "checkpoints").mkdir(exist_ok=True)
    dtype = _chosen_dtype(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start) if start else _tokenizer(recipe, out)
    set_seed(recipe.seed)
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32) if start else _fresh(recipe, tokenizer)
    pad, context = tokenizer.convert_tokens_to_ids(PAD), model.config.max_position_embeddings
    composer, corpus = Composer("train", seed=recipe.seed, follow_rate=recipe.corpus["follow_rate"]), recipe.corpus
    sources = Sources() if recipe.guide else None
    with Progress(console=Console(file=sys.stderr), disable=not progress) as bar:
        composed = partial(bar.track, description="composing")
        chats = composed(composer.chats(corpus["short_chats"], short=True), corpus["short_chats"])
        short = _Encoded(chats, tokenizer, context, sources)
        whole = _Encoded(composed(composer.chats(corpus["chats"]), corpus["chats"]), tokenizer, context, sources)
        model.guide = None
        if sources and embed:
            model.guide = _guide(recipe, model, tokenizer, sources, embed, partial(bar.track, description="reading"))
    held_out = _Encoded(Composer("dev", seed=recipe.seed).chats(corpus["held_out"]), tokenizer, context)
    optimizer = recipe.optimizer
    step = SHAPE_STEP if dtype == torch.bfloat16 else 1
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=optimizer["epochs"],
        per_device_eval_batch_size=32,
        lr_scheduler_type="cosine",
        warmup_steps=optimizer["warmup_steps"],
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=1000,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_steps=50,
        disable_tqdm=not progress,
        report_to=[],
        seed=recipe.seed,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    steps = MuonWithAdamW(
        model,
        model.guide,
        learning_rate=optimizer["learning_rate"],
        weight_decay=optimizer["weight_decay"],
        beta2=optimizer["beta2"],
        dtype=dtype,
    )
    trainer = _Trainer(
        model,
        arguments,
        batches=[
            *_batches(short.lengths, optimizer["batch_tokens"], recipe.seed, step=step),
            *_batches(whole.lengths, optimizer["batch_tokens"], recipe.seed, step=step, first=len(short)),
        ],
        optimizers=(steps, None),
        data_collator=lambda rows: _collate(rows, pad, step),
        train_dataset=torch.utils.data.ConcatDataset([short, whole]),
        eval_dataset=held_out,
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if progress:
        trainer.add_callback(Bar())
    begun = last_whole_checkpoint(out / "checkpoints")
    if begun and progress:
        print(f"going on from step {Path(begun).name.rpartition('-')[2]}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=begun)
    held_out_loss = trainer.evaluate()["eval_loss"]
    del model.guide
    folder = _export(model, tokenizer, out / "model")
    metrics = {
        "recipe": asdict(recipe),
        "corpus_digest": digest,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training_tokens": sum(short.lengths) + sum(whole.lengths),
        "held_out_loss": held_out_loss,  # nats a token, the mean over batches of 32 chats
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "sentence-transformers")},
        "log": trainer.state.log_history,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return folder, metrics


def _chosen_dtype(out: Path) -> torch.dtype:
    """The type that the run began in, measured at its beginning: one that goes on may not change it."""
    saved = out / "checkpoints" / "dtype.txt"
    if not saved.is_file():
        saved.write_text(str(fastest_dtype()).removeprefix("torch.") + "\n", encoding="utf-8")
    chosen: torch.dtype = getattr(torch, saved.read_text(encoding="utf-8").strip())
    return chosen


def corpus_digest() -> str:
    """Twelve hex digits of everything that the corpus is composed from: the data files and the composer's code."""
    digest = hashlib.sha256()
    root = Path(str(files("prefmw.training")))
    for path in sorted([*root.glob("*_files/**/*.toml"), *(root / f"{name}.py" for name in _COMPOSING)]):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _fresh(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model of the recipe's shape with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(END),
            pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
            **recipe.model,
        )
    )


def _tokenizer(recipe: Recipe, out: Path) -> PreTrainedTokenizerFast:
    folder = out / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        chats = Composer("train", seed=recipe.seed + 1).chats(recipe.tokenizer["chats"])
        texts = (message.content for chat in chats for message in chat.messages)
        context = recipe.model["max_position_embeddings"]
        train_tokenizer(texts, vocabulary=recipe.tokenizer["vocabulary"], context=context).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _guide(
    recipe: Recipe,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sources: Sources,
    embed: Embedder,
    progress: Callable[[list[list[str]]], Iterable[list[str]]],
) -> Guide:
    """The model's embeddings begun, and the heads that it learns with."""
    guide, texts = recipe.guide, list(sources.texts)
    begin_embeddings(model.model.embed_tokens, tokenizer, embed, guide["embeddings"])
    parts = progress([texts[at : at + 256] for at in range(0, len(texts), 256)])
    meanings = torch.from_numpy(np.concatenate([embed(part) for part in parts]))
    return Guide(model.config.hidden_size, guide["layer"], meanings, meaning=guide["meaning"], labels=guide["labels"])


class _Encoded(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Chats as token ids and labels, with what they teach ``sources``' guide, those beyond the context left out."""

    def __init__(
        self, chats: Iterable[Chat], tokenizer: PreTrainedTokenizerFast, context: int, sources: Sources | None = None
    ) -> None:
        self.ids: list[Tensor] = []
        self._said: list[Tensor] = []
        self._lessons: list[dict[str, Tensor]] = []
        for chat in chats:
            ids, said = encode_chat(chat.messages, tokenizer)
            if len(ids) > context:
                continue
            self.ids.append(torch.tensor(ids, dtype=torch.int16))  # ids are below 32,768
            self._said.append(torch.tensor(said))
            ends = [at for at, token in enumerate(ids) if token == tokenizer.eos_token_id]
            self._lessons.append(sources.lessons(chat, ends) if sources else {})
        self.lengths = [len(ids) for ids in self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index].long()
        return {"input_ids": ids, "labels": torch.where(self._said[index], ids, IGNORED), **self._lessons[index]}


def _collate(rows: Sequence[dict[str, Tensor]], pad: int, step: int) -> dict[str, Tensor]:
    """Rows (T,) padded on the right to (B, T), T a multiple of ``step``. Causal attention never looks behind a row,
    so no mask is needed. Lessons come one below the other, their places counted through the whole batch.
    """
    length = max(len(row["input_ids"]) for row in rows)
    length += -length % step
    batch = {"input_ids": torch.full((len(rows), length), pad), "labels": torch.full((len(rows), length), IGNORED)}
    for index, row in enumerate(rows):
        for key in ("input_ids", "labels"):
            batch[key][index, : len(row[key])] = row[key]
    for key in set(rows[0]) - set(batch):
        lessons = [row[key].long() for row in rows]
        for index, lesson in enumerate(lessons):
            lesson[:, 0] += index * length
        batch[key] = torch.cat(lessons)
    return batch


def _batches(lengths: Sequence[int], tokens: int, seed: int, *, step: int, first: int = 0) -> list[list[int]]:
    """Indices from ``first`` on in batches of like lengths, each of at most ``tokens`` padded tokens (one chat at
    least), shuffled.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 2000):
        batch: list[int] = []
        for index in sorted(order[start : start + 2000], key=lambda index: lengths[index]):
            longest = lengths[index] + -lengths[index] % step
            if batch and (len(batch) + 1) * longest > tokens:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    rng.shuffle(batches)
    return [[first + index for index in batch] for batch in batches]


class _Trainer(Trainer):  # type: ignore[misc]
    """transformers' trainer, with batches of a fixed number of tokens rather than chats, and with logits only where a
    token is learned: a small model's work is half vocabulary.
    """

    def __init__(self, *arguments: Any, batches: list[list[int]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._batches = batches

    def get_train_dataloader(self) -> Any:
        loader = torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self._batches, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inner = self.accelerator.unwrap_model(model)
        if inner.device.type == "cpu":
            inner.set_attn_implementation("eager" if inputs["input_ids"].shape[1] <= EAGER else "sdpa")
        labels = inputs["labels"].roll(-1, dims=1)  # (B, T), the token that follows each
        labels[:, -1] = IGNORED
        learned = (labels != IGNORED).flatten().nonzero().flatten()
        count = len(learned)
        learned = torch.cat([learned, learned[:1].expand(-count % (16 * SHAPE_STEP))])  # (N,)
        targets = labels.flatten()[learned]
        targets[count:] = IGNORED
        with self.accelerator.autocast():
            output = inner.model(input_ids=inputs["input_ids"], output_hidden_states="sources" in inputs)
            logits = inner.lm_head(output.last_hidden_state.flatten(0, 1)[learned])  # (N, V)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED)
        if "sources" in inputs:
            hidden = output.hidden_states[inner.guide.layer].flatten(0, 1)  # (B T, D)
            loss = loss + inner.guide(hidden, inputs["sources"], inputs["answers"])
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def _export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.to(torch.bfloat16)
    end = tokenizer.convert_tokens_to_ids(END)
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=0.7, top_p=0.8
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
