"""Replies scored by a reward model, many at a time: one of a LoRA on a chat model's engine, or a whole sequence
classification model.

Shapes: R replies, k outputs, K attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefmw.decoding import Engine
from prefmw.decoding.linears import Adapter
from prefmw.errors import ModelError
from prefmw.models import ChatModel, ModelSpec
from prefmw.models.chat_model import find_device
from prefmw.models.persrm import BackboneCard, check_backbone
from prefmw.models.reward import RewardCard, RewardModel
from prefmw.preferences import Message

Said = tuple[Sequence[Message], str]
"""A conversation with a user's message last, and a reply to it."""

READ_AT_ONCE = 8192
"""Tokens, padding included, that one forward of a whole model reads; one text at least."""


@dataclass(frozen=True, eq=False)
class Scorer:
    """A reward model at hand.

    Attributes:
        card: what it is.
        revision: of its files.
        chat: whose tokens it reads.
        read: outputs (R, k) of token ids.
    """

    card: RewardCard
    revision: str
    chat: ChatModel
    read: Callable[[list[list[int]]], Tensor]

    @property
    def label(self) -> str:
        """What a record names it by."""
        return f"{self.card.name}@{self.revision}"

    def outputs(self, replies: Sequence[Said]) -> Tensor:
        """What the model says of each reply, (R, k), 0-100 as far as it was trained to."""
        texts = [self.card.read(messages, reply, self.chat, self.chat.capacity) for messages, reply in replies]
        return self.read(texts) if texts else torch.zeros(0, len(self.card.outputs))

    def rewards(self, replies: Sequence[Said], attributes: Sequence[str]) -> Tensor:
        """r(x, y) over some attributes, (R, K).

        Raises:
            UsageError: the model does not score one of them.
        """
        mixture = self.card.mixture(attributes)
        return self.outputs(replies) @ mixture.T


def put_reward_on(model: RewardModel, chat: ChatModel, engine: Engine) -> Scorer:
    """A reward model of a LoRA on a chat model's engine.

    Raises:
        ModelError: the chat model is not the one that it was trained on.
    """
    check_backbone(f"the reward model '{model.card.name}'", BackboneCard(**model.card.backbone), chat)
    adapter = f"reward {model.revision}" if model.lora else None
    if adapter is not None:
        engine.ensure_adapter(adapter, Adapter(model.lora))

    def read(texts: list[list[int]]) -> Tensor:
        return torch.stack(engine.last_states(texts, adapter=adapter)) @ model.head.T

    return Scorer(model.card, model.revision, chat, read)


def load_whole_reward(card: RewardCard, source: str, revision: str, spec: ModelSpec, *, remote_code: bool) -> Scorer:
    """A reward model that is a sequence classification model, with its tokenizer.

    Args:
        source: its folder or hub id.
        spec: whose device, type and quantisation it is loaded in.
        remote_code: code that comes with it may run.

    Raises:
        ModelError: it cannot be loaded, or needs code that may not run.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if card.remote_code and not remote_code:
        raise ModelError(
            f"the reward model '{card.name}' needs code that comes with it; allow that by trust_remote_code "
            "(PREFMW_TRUST_REMOTE_CODE=1)"
        )
    device = find_device(spec.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=remote_code)
        module: Any = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, trust_remote_code=remote_code
        )
    except Exception as error:  # transformers, the hub and the network raise what they like
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the reward model '{card.name}' could not be loaded: {reason}") from error
    module = module.to(device).eval()
    if module.config.num_labels != len(card.outputs):
        raise ModelError(
            f"the reward model '{card.name}' has {module.config.num_labels} outputs where its card names "
            f"{len(card.outputs)}; get the right revision"
        )
    chat = _reader(card, source, revision, tokenizer, module, spec)
    pad = next((one for one in (module.config.pad_token_id, tokenizer.pad_token_id) if one is not None), 0)

    @torch.inference_mode()
    def read(texts: list[list[int]]) -> Tensor:
        found = torch.zeros(len(texts), len(card.outputs))
        for batch in _batches([len(text) for text in texts]):
            width = max(len(texts[index]) for index in batch)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, index in enumerate(batch):
                ids[row, : len(texts[index])] = torch.tensor(texts[index])
                mask[row, : len(texts[index])] = 1
            logits = module(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            found[batch] = logits.float().cpu()
        return found

    return Scorer(card, revision, chat, read)


def _reader(card: RewardCard, source: str, revision: str, tokenizer: Any, module: Any, spec: ModelSpec) -> ChatModel:
    """The chat model whose template and tokens a whole reward model reads; its own template only where it reads one."""
    from prefmw.models import ChatTemplate

    template: Any = None if card.template else ChatTemplate(tokenizer, name=card.name)
    return ChatModel(card.name, revision, module, tokenizer, template, 0.0, replace(spec, name=source))


def _batches(sizes: Sequence[int]) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batches and (len(batches[-1]) + 1) * sizes[index] <= READ_AT_ONCE:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
