"""Supervised fine-tuning of a chat model on replies under system prompts, by TRL's SFTTrainer: a LoRA, or all weights.

::

    loss = - mean over the replies' tokens of  log pi_theta(y_t | x, prompt, y_<t)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefmw.errors import TrainingError, UsageError
from prefmw.models import ChatModel
from prefmw.preferences import Message
from prefmw.training.dpa_recipe import Fit
from prefmw.training.runs import LikeLengths, check_finite, go_on, head_on_replies_alone, processes, usual_arguments

IGNORED = -100
"""The label of a token that is not learned."""


@dataclass(frozen=True)
class Lesson:
    """A conversation, its system prompt within, and the reply to learn."""

    messages: tuple[Message, ...]
    reply: str


def encode_lessons(lessons: Sequence[Lesson], chat: ChatModel, max_tokens: int) -> tuple[dict[str, list[Any]], int]:
    """The lessons as columns of ``input_ids`` and ``labels``, and how many were left out because they exceed
    ``max_tokens``.

    Raises:
        UsageError: none is left.
    """
    end = min(chat.template.end_of_turn or chat.stop_ids)
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    left_out = 0
    for lesson in lessons:
        prompt = chat.template.encode(lesson.messages)
        reply = [*chat.template.encode_reply(lesson.reply), end]
        if len(prompt) + len(reply) > min(max_tokens, chat.capacity):
            left_out += 1
            continue
        columns["input_ids"].append([*prompt, *reply])
        columns["labels"].append([*[IGNORED] * len(prompt), *reply])
    if not columns["input_ids"]:
        raise UsageError(f"no reply is left to learn: {left_out} are beyond {max_tokens} tokens")
    return columns, left_out


def fit_lessons(
    chat: ChatModel, columns: dict[str, list[Any]], out: Path, fit: Fit, *, seed: int, bf16: bool, progress: bool
) -> tuple[Any, list[dict[str, Any]]]:
    """The trained model, with its LoRA on it where the rank is above 0, and the training's log; goes on from the last
    checkpoint in ``out``.

    Raises:
        TrainingError: the loss or a weight is not a number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' own imports
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    accumulated = max(1, round(fit.batch / (fit.per_device * processes().num_processes)))
    lengths = [len(ids) for ids in columns["input_ids"]]
    rows = sum(lengths) // fit.max_tokens + 1 if fit.packing else len(lengths)
    steps = max(1, rows // fit.batch) * fit.epochs

    class Conditioned(SFTTrainer):  # type: ignore[misc]
        """TRL's trainer, which stops where a number is not finite; replies that are not packed come in like lengths."""

        def _get_train_sampler(self, *arguments: Any, **options: Any) -> Any:
            if fit.packing:
                return super()._get_train_sampler(*arguments, **options)
            return LikeLengths(lengths, fit.per_device * accumulated, seed)

        def _send_telemetry(self) -> None:
            """None, ever."""

        def create_model_card(self, *arguments: Any, **options: Any) -> None:
            """The checkpoint's own card says what it is."""

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            check_finite(loss[0] if isinstance(loss, tuple) else loss, f"step {self.state.global_step + 1}", out)
            return loss

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            for weight in model.parameters():
                if weight.requires_grad:
                    check_finite(weight, f"the weights after step {self.state.global_step}", out)
            super()._save_checkpoint(model, trial)

    arguments = SFTConfig(
        output_dir=str(out),
        learning_rate=fit.learning_rate,
        num_train_epochs=fit.epochs,
        per_device_train_batch_size=fit.per_device,
        gradient_accumulation_steps=accumulated,
        warmup_steps=min(fit.warmup_steps, int(steps) // 2),
        weight_decay=0.0,
        max_length=fit.max_tokens,
        packing=fit.packing,
        gradient_checkpointing=torch.cuda.is_available(),
        bf16=bf16,
        **usual_arguments(steps, progress=progress, seed=seed),
    )
    lora = None
    if fit.rank:
        lora = LoraConfig(
            r=fit.rank, lora_alpha=2 * fit.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Conditioned(
            model=chat.module,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            processing_class=chat.tokenizer,
            peft_config=lora,
        )
    with head_on_replies_alone():
        go_on(trainer, out, "the training", progress=progress)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise TrainingError("this chat model has no linear layers that a LoRA could be put on; choose another")
    return model.eval(), trainer.state.log_history
