"""A multi-objective reward model as it is stored and loaded: a backbone, a LoRA, and k regression outputs, 0-100.

::

    r(x, y) = H h_theta(x, y)

h in R^D after the final norm at the last token of what is read, H (k, D) without a bias, so that
a merged model is a sequence classification model of transformers. What DPA calls an attribute is the mean of some of
the outputs. On disk it is a folder: ``reward.json``, the card, and ``reward.safetensors``; or a whole sequence
classification model with the card beside it.

Source: Wang et al., "Arithmetic Control of LLMs ...", section 3.1, "Reward Modeling"; outputs, input and scale of the
released model as its card says.

Shapes: k outputs, K attributes, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefmw.errors import ModelError, ModelNotFoundError, UsageError, nearest
from prefmw.models.chat_model import ChatModel, fingerprint
from prefmw.models.lora_files import Lora, check_numbers, lora_among, read_tensors, write_tensors
from prefmw.preferences import Message

REWARD_CARD, WEIGHTS = "reward.json", "reward.safetensors"

FORMAT = 1
"""Of the card."""

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("overall_score", "instruction_following", "truthfulness", "honesty", "helpfulness")

OBJECTIVES = {
    "helpfulness": tuple(f"ultrafeedback-{name}" for name in ULTRAFEEDBACK[1:]),
    "verbosity": ("helpsteer-verbosity",),
}
"""The paper's two attributes as means of outputs; the overall score is left out."""


@dataclass(frozen=True)
class RewardCard:
    """What a reward model is.

    Attributes:
        name: as results name it.
        outputs: what its outputs score, in their order.
        objectives: attributes as means of outputs; an output is an attribute of its own name besides.
        template: what it reads, with ``{prompt}`` and ``{response}`` in it; empty for the conversation in the
            backbone's chat template, the reply with the end of its turn.
        ask: what a user then says, with ``{prompt}`` in it or not; the reward is read where the next reply would begin.
            Empty for nothing: it is read at the end of the reply's turn.
        weights: ``lora`` on a chat model, or ``whole``, a sequence classification model.
        backbone: of a LoRA, the model that it was trained on.
        remote_code: it needs code that comes with it.
        training: how it was made.
    """

    name: str
    outputs: tuple[str, ...]
    objectives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    template: str = ""
    ask: str = ""
    weights: str = "lora"
    backbone: Mapping[str, Any] = field(default_factory=dict)
    remote_code: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for parts in self.objectives.values():
            for name in parts:
                if name not in self.outputs:
                    raise UsageError(f"the reward model '{self.name}' has no output '{name[:40]}'")
        if self.template and not ("{prompt}" in self.template and "{response}" in self.template):
            raise UsageError("a reward model's template holds {prompt} and {response}")

    @property
    def attributes(self) -> tuple[str, ...]:
        """Everything that it can score."""
        return tuple(dict.fromkeys((*self.objectives, *self.outputs)))

    def mixture(self, attributes: Sequence[str]) -> Tensor:
        """(K, k): what of each output counts for each attribute.

        Raises:
            UsageError: the model does not score one of them.
        """
        found = torch.zeros(len(attributes), len(self.outputs))
        for row, attribute in enumerate(attributes):
            if attribute not in self.attributes:
                raise UsageError(
                    f"the reward model '{self.name}' does not score '{attribute[:40]}': "
                    f"{nearest(attribute[:40], self.attributes)}"
                )
            parts = self.objectives.get(attribute, (attribute,))
            for name in parts:
                found[row, self.outputs.index(name)] = 1 / len(parts)
        return found

    def read(self, messages: Sequence[Message], reply: str, chat: ChatModel, max_tokens: int) -> list[int]:
        """What the model reads, as token ids; of what is longer than ``max_tokens`` the conversation's beginning is
        left out.
        """
        if self.template:
            turns = [message.content for message in messages if message.role == "user"]
            filled = {"{prompt}": turns[-1] if turns else "", "{response}": reply}
            text = self.template
            for name, value in filled.items():
                text = text.replace(name, value)
            ids: list[int] = chat.tokenizer(text)["input_ids"]
            return ids[-max_tokens:]
        if self.ask:
            return chat.template.encode(self.asked(messages, reply))[-max_tokens:]
        end = min(chat.template.end_of_turn or chat.stop_ids)
        ids = [*chat.template.encode(messages), *chat.template.encode_reply(reply), end]
        return ids[-max_tokens:]

    def asked(self, messages: Sequence[Message], reply: str) -> list[Message]:
        """The conversation with the reply and what is asked behind it."""
        prompt = next((message.content for message in reversed(messages) if message.role == "user"), "")
        return [*messages, Message("assistant", reply), Message("user", self.ask.replace("{prompt}", prompt))]

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


RELEASED = RewardCard(
    name="RewardModel-Mistral-7B-for-DPA-v1",
    outputs=(*(f"helpsteer-{name}" for name in HELPSTEER), *(f"ultrafeedback-{name}" for name in ULTRAFEEDBACK)),
    objectives=OBJECTIVES,
    template=(
        "[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 "
        "in these aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity\n\nUser: {prompt}\n\n"
        "Assistant: {response} [/INST]"
    ),
    weights="whole",
    remote_code=True,
)
"""The authors' reward model, which has no card of its own."""

REWARD_PRESETS = {"Haoxiang-Wang/RewardModel-Mistral-7B-for-DPA-v1": RELEASED}
"""Cards of released reward models, by hub id."""


@dataclass(frozen=True)
class RewardModel:
    """A loaded checkpoint of a LoRA; ``head`` is H (k, D), float32."""

    card: RewardCard
    revision: str
    lora: Lora
    head: Tensor


def read_reward_card(folder: Path) -> RewardCard:
    """The card in a checkpoint's folder.

    Raises:
        ModelNotFoundError: there is none.
        ModelError: it is none, or is cut short.
    """
    if not (folder / REWARD_CARD).is_file():
        raise ModelNotFoundError(
            f"no reward model in '{folder}': it holds no {REWARD_CARD}; name the folder that 'prefmw train reward' "
            "wrote, or a hub id"
        )
    try:
        table = json.loads((folder / REWARD_CARD).read_text(encoding="utf-8"))
        if table.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        table["outputs"] = tuple(table["outputs"])
        table["objectives"] = {name: tuple(parts) for name, parts in table["objectives"].items()}
        return RewardCard(**table)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, UsageError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"'{folder / REWARD_CARD}' is no reward model's card, or is cut short: {reason}") from error


def load_reward(folder: Path) -> RewardModel:
    """Read a checkpoint's folder.

    Raises:
        ModelNotFoundError: there is none.
        ModelError: a file is cut short or no reward model's, or its parts do not fit each other.
    """
    card = read_reward_card(folder)
    tensors = read_tensors(folder / WEIGHTS, "reward model")
    lora = lora_among(tensors, folder, "reward model")
    head = tensors.get("head")
    if head is None or head.dim() != 2 or len(head) != len(card.outputs):
        got = None if head is None else tuple(head.shape)
        raise ModelError(f"the reward model in '{folder}' needs a head of {len(card.outputs)} rows, got {got}")
    check_numbers([head], folder, "reward model")
    return RewardModel(card, fingerprint(folder), lora, head.float())


def save_reward(folder: Path, model: RewardModel, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint, the card last, so that a folder with a card is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REWARD_CARD).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS, model.lora, {"head": model.head}, dtype)
    (folder / REWARD_CARD).write_text(model.card.to_json(), encoding="utf-8")


def write_merged(folder: Path, model: RewardModel, chat: ChatModel, source: str, dtype: torch.dtype) -> None:
    """Write backbone, LoRA and head as one sequence classification model, which plain transformers loads.

    Args:
        source: the backbone's folder or hub id.

    Raises:
        ModelError: transformers has no such model of this architecture.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    card = model.card
    logging.set_verbosity_error()  # that the head is new
    try:
        merged = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(card.outputs),
            id2label=dict(enumerate(card.outputs)),
            label2id={name: index for index, name in enumerate(card.outputs)},
            dtype=torch.float32,
        )
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence classification model of '{chat.name}'; keep the LoRA instead"
        ) from error
    layers = dict(merged.named_modules())
    with torch.no_grad():
        for name, (down, up) in model.lora.items():
            layers[name].weight += up @ down
        merged.score.weight.copy_(model.head)
    merged.config.problem_type = "regression"
    tokenizer = chat.tokenizer
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(_padding(chat))
    merged.config.pad_token_id = tokenizer.pad_token_id
    folder.mkdir(parents=True, exist_ok=True)
    merged.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    whole = replace(card, weights="whole", backbone={})
    (folder / REWARD_CARD).write_text(whole.to_json(), encoding="utf-8")


def _padding(chat: ChatModel) -> int:
    """A token to pad with that ends no turn: transformers scores the last token that is no padding, which would be the
    one before the end where the two are one.
    """
    tokenizer = chat.tokenizer
    named: list[int | None] = [
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        *range(len(chat.stop_ids) + 1),
    ]
    return next(index for index in named if index is not None and index not in chat.stop_ids)
