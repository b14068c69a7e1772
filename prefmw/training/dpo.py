"""Stage 1 of a PersRM: the LoRA, trained by TRL's DPOTrainer with w_p fixed at 1.

With w_p = 1 the PAD paper's Eq. 9 is DPO's loss on prompts that carry the preference (Rafailov et al., 2023, Eq. 7)::

    r(y) = beta [log pi_theta(y | x, p) - log pi_ref(y | x, p)],    loss = -log sigma(r(y_w) - r(y_l))

since w_p^T log pi-hat(a|s) = log pi(a|s,p), and a sequence's log-probability is the sum of its tokens'.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefmw.errors import TrainingError
from prefmw.models import ChatModel
from prefmw.training.pair_reading import EncodedPair
from prefmw.training.runs import LikeLengths, check_finite, go_on, head_on_replies_alone, processes, usual_arguments


def train_lora(
    chat: ChatModel,
    train: list[EncodedPair],
    references: Tensor,
    out: Path,
    *,
    rank: int,
    alpha: int,
    beta: float,
    learning_rate: float,
    epochs: float,
    batch: int,
    per_device: int,
    warmup: float,
    seed: int,
    bf16: bool,
    progress: bool,
) -> tuple[Any, list[dict[str, Any]]]:
    """The model with a trained LoRA on all its linear layers but the head, and the training's log; goes on from the
    last checkpoint in ``out``.

    Args:
        references: log pi_ref of chosen and rejected replies, (pairs, 2).
        batch: pairs of one step on all devices together; ``per_device`` of them go through a device at once.

    Raises:
        TrainingError: the loss or a weight is not a number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' own imports
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    devices = processes().num_processes
    accumulated = max(1, round(batch / (per_device * devices)))

    class Stage1(DPOTrainer):  # type: ignore[misc]
        """TRL's trainer over pairs that are token ids already, with their reference log-probabilities."""

        def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *arguments: Any, **options: Any) -> LikeLengths:
            lengths = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in train]
            return LikeLengths(lengths, per_device * accumulated, seed)

        def _send_telemetry(self) -> None:
            """None, ever."""

        def create_model_card(self, *arguments: Any, **options: Any) -> None:
            """The PersRM's own card says what it is."""

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            check_finite(loss, f"stage 1, step {self.state.global_step + 1}", out)
            return loss

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            for weight in model.parameters():
                if weight.requires_grad:
                    check_finite(weight, f"stage 1, the weights after step {self.state.global_step}", out)
            super()._save_checkpoint(model, trial)

    rows = {
        "prompt_ids": [pair.prompt for pair in train],
        "chosen_ids": [pair.chosen for pair in train],
        "rejected_ids": [pair.rejected for pair in train],
        "ref_chosen_logps": references[:, 0].tolist(),
        "ref_rejected_logps": references[:, 1].tolist(),
    }
    steps = max(1, len(train) // max(1, accumulated * per_device * devices)) * epochs
    arguments = DPOConfig(
        output_dir=str(out),
        beta=beta,
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulated,
        warmup_steps=int(warmup * steps),
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=torch.cuda.is_available(),
        bf16=bf16,
        **usual_arguments(steps, progress=progress, seed=seed),
    )
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Stage1(
        model=chat.module,
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=chat.tokenizer,
        peft_config=lora,
    )
    with head_on_replies_alone():
        go_on(trainer, out, "stage 1", progress=progress)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise TrainingError("this backbone has no linear layers that a LoRA could be put on; choose another")
    return model.eval(), trainer.state.log_history
