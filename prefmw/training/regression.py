"""A LoRA and a regression head trained together on scored replies, with the language-model loss of the replies beside.

Shapes: B replies, T tokens, k outputs, D hidden.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from prefmw.models import ChatModel
from prefmw.models.reward import RewardCard
from prefmw.training.pair_reading import head_logits
from prefmw.training.runs import LikeLengths, check_finite, go_on, lora_of, processes, usual_arguments
from prefmw.training.scored import Scored

AT_ONCE = 8192
"""Tokens, padding included, of a forward that learns nothing."""

PENALTY = 1e-3
"""Of the ridge regression, beside the mean square of the states."""


@dataclass(frozen=True)
class EncodedReply:
    """What a reward model reads of a reply, where the reply's tokens begin and end in it, and scores as shares of 100,
    NaN where one is missing.
    """

    ids: list[int]
    begins: int
    ends: int
    scores: list[float]


def encode(row: Scored, card: RewardCard, chat: ChatModel) -> EncodedReply:
    """A scored reply as token ids. Where a chat template writes a conversation that goes on otherwise than one that
    ends, the reply's tokens are not told apart, and the language-model loss leaves them out.
    """
    ids = card.read(row.messages, row.response, chat, chat.capacity)
    prompt = chat.template.encode(row.messages)
    end = min(chat.template.end_of_turn or chat.stop_ids)
    said = [*prompt, *chat.template.encode_reply(row.response), end]
    begins, ends = (len(prompt), len(said)) if ids[: len(said)] == said else (0, 0)
    return EncodedReply(ids, begins, ends, [row.scores.get(name, math.nan) / 100 for name in card.outputs])


@torch.no_grad()
def last_states(
    module: Any, rows: Sequence[EncodedReply], progress: Callable[[int, int], None] = lambda done, total: None
) -> Tensor:
    """The hidden state at each reply's last token, (R, D), float32."""
    found: dict[int, Tensor] = {}
    device = module.get_input_embeddings().weight.device
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    while len(found) < len(rows):
        batch = order[
            len(found) : len(found) + max(1, AT_ONCE // len(rows[order[min(len(found) + 31, len(order) - 1)]].ids))
        ]
        width = max(len(rows[index].ids) for index in batch)
        tokens = torch.tensor([[*rows[index].ids, *[0] * (width - len(rows[index].ids))] for index in batch])
        states = module.base_model(input_ids=tokens.to(device), use_cache=False).last_hidden_state
        for place, index in enumerate(batch):
            found[index] = states[place, len(rows[index].ids) - 1].float().cpu()
        progress(len(found), len(rows))
    return torch.stack([found[index] for index in range(len(rows))])


def ridge(module: Any, rows: Sequence[EncodedReply], progress: Callable[[int, int], None]) -> Tensor:
    """H (k, D) of the regression of scores on the untrained backbone's states, each output by the rows that have it."""
    states = last_states(module, rows, progress).double()
    scores = torch.tensor([row.scores for row in rows]).double()
    penalty = PENALTY * states.square().mean() * torch.eye(states.shape[1], dtype=torch.float64)
    head = []
    for output in range(scores.shape[1]):
        known = scores[:, output].isfinite()
        some, wanted = states[known], scores[known, output]
        head.append(torch.linalg.solve(some.T @ some + len(some) * penalty, some.T @ wanted))
    return torch.stack(head).float()


def predict(module: Any, head: Tensor, rows: Sequence[EncodedReply]) -> Tensor:
    """What backbone and head say of each reply, (R, k), as shares of 100."""
    return last_states(module, rows) @ head.T


class Regression(nn.Module):
    """Backbone, head and loss: ``policy`` is the backbone with its LoRA, ``lm`` the weight of the second loss."""

    def __init__(self, policy: Any, head: Tensor, lm: float) -> None:
        super().__init__()
        self.policy = policy
        self.head = nn.Parameter(head.clone())
        self._lm = lm

    def forward(self, input_ids: Tensor, last: Tensor, said: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """The loss over a batch.

        Args:
            input_ids: (B, T), padded behind.
            last: the place of each reply's last token, (B,).
            said: whether a token is the reply's, (B, T).
            scores: (B, k), shares of 100, NaN where missing.
        """
        module = self.policy.get_base_model()
        hidden = module.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
        states = hidden[torch.arange(len(last), device=hidden.device), last].float()
        known = scores.isfinite()
        errors = torch.where(known, states @ self.head.T - scores.nan_to_num(), 0.0)
        loss = errors.square().sum() / known.sum().clamp(min=1)
        before = said[:, 1:].flatten().nonzero().flatten()
        if self._lm and len(before):
            logits = head_logits(module, hidden[:, :-1].flatten(0, 1)[before])
            loss = loss + self._lm * nn.functional.cross_entropy(logits, input_ids[:, 1:].flatten()[before])
        return {"loss": loss}


def train_regression(
    chat: ChatModel,
    head: Tensor,
    train: Sequence[EncodedReply],
    out: Path,
    *,
    rank: int,
    alpha: int,
    learning_rate: float,
    batch: int,
    per_device: int,
    epochs: float,
    warmup: float,
    lm: float,
    seed: int,
    bf16: bool,
    progress: bool,
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, list[dict[str, Any]]]:
    """LoRA and head, and the training's log; goes on from the last checkpoint in ``out``. The LoRA is left on ``chat``.

    Args:
        head: what the head begins with, (k, D).
        batch: replies of one step on all devices together; ``per_device`` of them go through a device at once.

    Raises:
        TrainingError: the loss or a weight is not a number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' own imports
        from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = Regression(get_peft_model(chat.module, lora), head.to(chat.device), lm)
    accumulated = max(1, round(batch / (per_device * processes().num_processes)))

    class Fitted(Trainer):  # type: ignore[misc]
        """transformers' trainer, whose checkpoints hold what is trained and not the backbone."""

        def _get_train_sampler(self, *arguments: Any, **options: Any) -> LikeLengths:
            return LikeLengths([len(row.ids) for row in train], per_device * accumulated, seed)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = model(**inputs)["loss"]
            check_finite(loss, f"step {self.state.global_step + 1}", out)
            return loss

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            inner = self.accelerator.unwrap_model(self.model)
            trained = {name: weight.detach().cpu() for name, weight in inner.named_parameters() if weight.requires_grad}
            for weight in trained.values():
                check_finite(weight, f"the weights after step {self.state.global_step}", out)
            torch.save(trained, folder / "trained.pt")

        def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
            trained = torch.load(Path(checkpoint) / "trained.pt", weights_only=True)
            self.accelerator.unwrap_model(model or self.model).load_state_dict(trained, strict=False)

    def collate(rows: Sequence[EncodedReply]) -> dict[str, Tensor]:
        width = max(len(row.ids) for row in rows)
        said = torch.zeros(len(rows), width, dtype=torch.bool)
        for place, row in enumerate(rows):
            said[place, row.begins : row.ends] = True
        return {
            "input_ids": torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows]),
            "last": torch.tensor([len(row.ids) - 1 for row in rows]),
            "said": said,
            "scores": torch.tensor([row.scores for row in rows]),
        }

    steps = max(1, len(train) // max(1, batch)) * epochs
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulated,
        learning_rate=learning_rate,
        warmup_steps=int(warmup * steps),
        weight_decay=0.0,
        bf16=bf16,
        **usual_arguments(steps, progress=progress, seed=seed),
        remove_unused_columns=False,
        label_names=["scores"],
    )
    trainer = Fitted(model, arguments, data_collator=collate, train_dataset=list(train))
    go_on(trainer, out, "the training", progress=progress)
    model.eval()
    return lora_of(model.policy), model.head.detach().float().cpu(), trainer.state.log_history
