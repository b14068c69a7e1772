"""A DPA checkpoint as it is stored and loaded: the card, and beside it a LoRA on a chat model, or a whole chat model.

What a card says and how directions become prompts is :mod:`prefmw.preferences.directions`, which needs no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from prefmw.errors import ModelError, ModelNotFoundError, UsageError
from prefmw.models.chat_model import ChatModel, fingerprint
from prefmw.models.lora_files import Lora, lora_among, read_tensors, write_tensors
from prefmw.models.persrm import BackboneCard, check_backbone
from prefmw.preferences.directions import DPA_CARD, DPACard, read_card

WEIGHTS = "dpa.safetensors"


@dataclass(frozen=True)
class DPA:
    """A loaded checkpoint of a LoRA."""

    card: DPACard
    revision: str
    lora: Lora

    def check_backbone(self, chat: ChatModel) -> None:
        """Raise ModelError where ``chat`` is not the model that this was trained on."""
        check_backbone(f"the DPA checkpoint '{self.card.name}'", BackboneCard(**self.card.backbone), chat)


def load_dpa(folder: Path) -> DPA:
    """Read the folder of a checkpoint that is a LoRA.

    Raises:
        ModelNotFoundError: there is none.
        ModelError: a file is cut short or no checkpoint's.
    """
    card = read_card(folder)
    if card is None:
        raise ModelNotFoundError(f"no DPA checkpoint in '{folder}': it holds no {DPA_CARD}")
    if card.weights != "lora":
        raise ModelError(f"the DPA checkpoint in '{folder}' is a whole model; name it as the chat model, with -m")
    try:
        BackboneCard(**card.backbone)
    except TypeError as error:
        raise ModelError(f"'{folder / DPA_CARD}' does not tell which model its LoRA is for") from error
    tensors = read_tensors(folder / WEIGHTS, "DPA checkpoint")
    return DPA(card, fingerprint(folder), lora_among(tensors, folder, "DPA checkpoint"))


def save_dpa(folder: Path, card: DPACard, lora: Lora, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint that is a LoRA, the card last, so that a folder with a card is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DPA_CARD).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS, lora, {}, dtype)
    (folder / DPA_CARD).write_text(card.to_json(), encoding="utf-8")


def check_is_directional(card: DPACard) -> None:
    """Raise UsageError for a checkpoint that reads rewards, not directions."""
    if card.condition != "direction":
        raise UsageError(
            f"the checkpoint '{card.name}' is conditioned on rewards, not on directions: it is what iteration 1 is "
            "made from; name that of a later iteration"
        )
