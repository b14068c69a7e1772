"""Stage 2 of a PersRM: W of w_p = 1 + W e(p), trained on the frozen policy's hidden states with the loss of stage 1.

Hidden states are kept, within a byte budget, when they are first computed; those beyond it are computed again.

Shapes: B pairs, N tokens of their replies one behind the other, D hidden, P preference texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prefmw.training.pair_reading import EncodedPair, log_probabilities, reply_states
from prefmw.training.runs import Bar, check_finite, last_whole_checkpoint, processes


class States:
    """The policy's hidden states at the replies of pairs, chosen and rejected one behind the other, (N, D) each.

    Args:
        module: the frozen policy.
        pairs: whose.
        budget: bytes that may be kept.
    """

    def __init__(self, module: Any, pairs: Sequence[EncodedPair], budget: int) -> None:
        self.module = module
        self.kept: dict[int, Tensor] = {}
        self.bytes = 0
        self._pairs = pairs
        self._budget = budget

    def of(self, indices: Sequence[int]) -> list[Tensor]:
        """Of these pairs, in their order."""
        missing = [index for index in indices if index not in self.kept]
        found = {index: self.kept[index] for index in indices if index in self.kept}
        if missing:
            prompts = [self._pairs[index].prompt for index in missing for _ in range(2)]
            replies = [reply for index in missing for reply in (self._pairs[index].chosen, self._pairs[index].rejected)]
            states = reply_states(self.module, prompts, replies)
            for place, index in enumerate(missing):
                found[index] = torch.cat(states[2 * place : 2 * place + 2])
                size = found[index].numel() * 2
                if self.bytes + size <= self._budget:
                    self.kept[index] = found[index].to("cpu", torch.bfloat16)
                    self.bytes += size
        return [found[index] for index in indices]


class PreferenceHead(nn.Module):
    """W (D, D), zero at first, with the loss of pairs::

        -log sigma(beta [(log pi_theta(y_w; w_p) - log pi_ref(y_w)) - (the same of y_l)]) + penalty ||W||^2

    The policy's output embeddings are read and not trained.
    """

    def __init__(self, module: Any, meanings: Tensor, *, beta: float, penalty: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(meanings.shape[1], meanings.shape[1]))
        self._policy = [module]  # in a list, so that it is no part of this
        self._meanings = meanings
        self._beta, self._penalty = beta, penalty

    def forward(
        self, hidden: Tensor, targets: Tensor, owner: Tensor, preference: Tensor, reference: Tensor
    ) -> dict[str, Tensor]:
        """Loss and margins.

        Args:
            hidden: of all tokens of B pairs, (N, D).
            targets: the tokens, (N,).
            owner: 2 b for those of pair b's chosen reply, 2 b + 1 for its rejected one's, (N,).
            preference: the pairs' texts, (B,).
            reference: log pi_ref of both replies, (B, 2).
        """
        meanings = self._meanings.to(self.weight.device)[preference]  # (B, D)
        scales = 1 + meanings @ self.weight.T
        hidden = hidden.float() * scales[owner // 2]
        each = log_probabilities(self._policy[0], hidden, targets)
        sums = torch.zeros(2 * len(preference), device=each.device).index_add(0, owner, each).view(-1, 2)
        ratios = sums - reference
        margins = self._beta * (ratios[:, 0] - ratios[:, 1])
        loss = -nn.functional.logsigmoid(margins).mean() + self._penalty * self.weight.square().sum()
        return {"loss": loss, "margins": margins.detach()}


def train_head(
    module: Any,
    train: Sequence[EncodedPair],
    references: Tensor,
    meanings: Tensor,
    out: Path,
    *,
    judge: Callable[[Tensor], tuple[float, float]],
    beta: float,
    penalty: float,
    learning_rate: float,
    epochs: float,
    batch: int,
    budget: int,
    seed: int,
    progress: bool,
) -> tuple[Tensor, list[dict[str, Any]], dict[str, Any]]:
    """The W of the epoch whose held-out accuracy, then loss, is the best by ``judge``, W = 0 among them; the log; and
    what was kept. Goes on from the last checkpoint in ``out``.

    Raises:
        TrainingError: the loss or a weight is not a number.
    """
    states = States(module, train, budget)
    head = PreferenceHead(module, meanings, beta=beta, penalty=penalty)
    best = _Best(head, judge, out / "best.json")

    def collate(indices: list[int]) -> dict[str, Tensor]:
        pairs = [train[index] for index in indices]
        lengths = [len(reply) for pair in pairs for reply in (pair.chosen, pair.rejected)]
        device = module.get_input_embeddings().weight.device
        return {
            "hidden": torch.cat([state.to(device, torch.float32) for state in states.of(indices)]),
            "targets": torch.tensor([token for pair in pairs for token in (*pair.chosen, *pair.rejected)]),
            "owner": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
            "preference": torch.tensor([pair.preference for pair in pairs]),
            "reference": references[indices],
        }

    class Stage2(Trainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = model(**inputs)["loss"]
            check_finite(loss, f"stage 2, step {self.state.global_step + 1}", out)
            return loss

    steps = max(1, len(train) // batch) * epochs
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=max(1, min(10, int(steps) // 20)),
        disable_tqdm=not progress,
        report_to=[],
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Stage2(head, arguments, data_collator=collate, train_dataset=list(range(len(train))), callbacks=[best])
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if progress:
        trainer.add_callback(Bar())
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(out))
    about = {"epochs": best.seen, "kept_pairs": len(states.kept), "kept_bytes": states.bytes}
    return best.weight(), trainer.state.log_history, about


class _Best(TrainerCallback):  # type: ignore[misc]
    """Judges W after each epoch and remembers the best one, beside the checkpoints."""

    def __init__(self, head: PreferenceHead, judge: Callable[[Tensor], tuple[float, float]], file: Path) -> None:
        self._head, self._judge, self._file = head, judge, file
        self.seen: list[dict[str, float]] = []
        self._weights: list[Tensor] = []
        if file.is_file() and last_whole_checkpoint(file.parent):
            self.seen = json.loads(file.read_text(encoding="utf-8"))
            self._weights = list(torch.load(file.with_suffix(".pt"), weights_only=True))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge W = 0."""
        self.seen, self._weights = (
            self.seen[: round(state.epoch or 0) + 1],
            self._weights[: round(state.epoch or 0) + 1],
        )
        if not self.seen:
            self._take(0)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what W is now; before the checkpoint, which a resumed run believes."""
        self._take(len(self.seen))

    def weight(self) -> Tensor:
        """The best."""
        ranked = [(one["accuracy"], -one["loss"]) for one in self.seen]
        return self._weights[ranked.index(max(ranked))]

    def _take(self, epoch: int) -> None:
        weight = self._head.weight.detach().cpu().clone()
        accuracy, loss = self._judge(weight)
        self.seen.append({"epoch": epoch, "accuracy": accuracy, "loss": loss, "size": float(weight.norm())})
        self._weights.append(weight)
        if not processes().is_main_process:  # all processes have the same W
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self._weights, self._file.with_suffix(".pt"))
        self._file.write_text(json.dumps(self.seen), encoding="utf-8")
