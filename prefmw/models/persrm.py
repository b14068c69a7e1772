"""PersRM: PAD's personalised reward model as it is stored and loaded, and what it makes of a preference in words.

A PersRM is a backbone (a chat model), a LoRA on its linear layers, and a preference head::

    logits_theta(. | s, p) = E (w_p * h_theta(s)),    w_p = 1 + W e(p)

h in R^D after the final norm, E the output embeddings; e(p) the mean of the backbone's last hidden states over the
tokens of the preference text, without LoRA and without a template, standardised over the training set's texts. On disk
it is a folder: ``persrm.json``, the card, and ``persrm.safetensors``.

Departures from print (Chen et al., "PAD: Personalized Alignment of LLMs at Decoding-Time"):

1. w_p weights the policy's features alone, as in the released code; Eq. 9 and 13 print it outside the ratio to the
   reference.
2. w_p is 1 + W e(p), so that W = 0 is stage 1 to the token and a person without a preference has the policy as it is;
   the paper's value head has no such point. The released code has a Linear(D, D) on h in its place, the same for
   everybody; such a head is loaded too.

Shapes: D hidden, r LoRA rank, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefmw.errors import ModelError, ModelNotFoundError, UsageError
from prefmw.models.chat_model import ChatModel, fingerprint
from prefmw.models.lora_files import check_numbers, lora_among, read_tensors, write_tensors
from prefmw.preferences import Message

CARD, WEIGHTS = "persrm.json", "persrm.safetensors"

FORMAT = 1
"""Of the card."""

_SAMPLED = 16
"""Numbers of each of a model's tensors that tell it from another's."""


@dataclass(frozen=True)
class Prefix:
    """How a preference stands in front of a conversation: what the system prompt and the first user message become.

    ``{preference}`` and ``{prompt}`` stand for the preference text and the user's own words. The default is the paper's
    (Appendix A.2). Base, policy and reference all read it.
    """

    system: str = "Your task is to generate response by considering the following preference."
    user: str = "{preference}\n\n{prompt}"

    def __post_init__(self) -> None:
        if "{prompt}" not in self.user or "{preference}" not in self.system + self.user:
            raise UsageError("a prefix template holds {prompt} in its user part, and {preference} in one of its parts")

    def applied(self, messages: Sequence[Message], preference: str, default_system: str = "") -> list[Message]:
        """The conversation with the preference in front, behind its own system prompt or the one that the chat template
        would write.
        """

        def filled(template: str, prompt: str = "") -> str:
            values = {"{preference}": preference, "{prompt}": prompt}
            return re.sub(r"\{(?:preference|prompt)\}", lambda found: values[found[0]], template)

        system = "\n\n".join(message.content for message in messages if message.role == "system" and message.content)
        parts = [part for part in (system or default_system, filled(self.system)) if part]
        turns = [message for message in messages if message.role != "system"]
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            turns[first] = Message("user", filled(self.user, turns[first].content))
        return [Message("system", "\n\n".join(parts)), *turns] if parts else turns


@dataclass(frozen=True)
class BackboneCard:
    """Which model a PersRM was trained on: its name, revision, and what tells its weights and shape from another's."""

    name: str
    revision: str
    weights: str
    hidden_size: int
    vocabulary: int

    @classmethod
    def of(cls, chat: ChatModel) -> BackboneCard:
        """A loaded chat model's."""
        head = chat.module.get_output_embeddings()
        return cls(chat.name, chat.revision, weights_digest(chat.module), int(head.weight.shape[1]), chat.vocabulary)


@dataclass(frozen=True)
class Card:
    """What ``persrm.json`` holds.

    ``head`` is ``scale`` (W), ``none`` (w_p = 1 for everybody) or ``linear``, the released Linear(D, D) on h; that
    one's weights may lie in ``head_file``, a PyTorch file. ``reference`` is the ``backbone`` or, as in the released
    code, the ``base`` model's own logits, whatever the base is.
    """

    name: str
    backbone: BackboneCard
    prefix: Prefix = field(default_factory=Prefix)
    head: str = "scale"
    head_file: str = ""
    reference: str = "backbone"
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True)
class PersRM:
    """A loaded checkpoint.

    Attributes:
        card: what it is.
        revision: twelve hex digits that change when its files do.
        lora: for linear layers by their module name, A (r, in) and B (out, r), B scaled by alpha / r already.
        weight: W, (D, D), for the head ``scale``.
        mean: of e(p) over the training set's texts, (D,).
        deviation: likewise its standard deviation, > 0.
        linear: the released variant's map of h.
    """

    card: Card
    revision: str
    lora: Mapping[str, tuple[Tensor, Tensor]]
    weight: Tensor | None = None
    mean: Tensor | None = None
    deviation: Tensor | None = None
    linear: nn.Linear | None = None

    def standardised(self, meaning: Tensor) -> Tensor:
        """e(p) of raw means of hidden states, (..., D), float32."""
        assert self.mean is not None
        assert self.deviation is not None
        return (meaning.float() - self.mean) / self.deviation

    def scale(self, meaning: Tensor | None) -> Tensor | None:
        """w_p = 1 + W e(p), (D,), float32, of :func:`meaning_of` a preference text, ``None`` for an empty one, whose
        e(p) is 0. ``None`` where the checkpoint has no such head.
        """
        if self.weight is None:
            return None
        if meaning is None:
            return torch.ones(len(self.weight))
        return 1 + self.weight @ self.standardised(meaning)

    def check_backbone(self, chat: ChatModel) -> None:
        """Raise ModelError where ``chat`` is not the model that this was trained on."""
        check_backbone(f"the PersRM '{self.card.name}'", self.card.backbone, chat)


def check_backbone(what: str, ours: BackboneCard, chat: ChatModel) -> None:
    """Raise ModelError where ``chat`` is not the model ``ours`` that a checkpoint, ``what``, was trained on."""
    theirs = BackboneCard.of(chat)
    what = f"{what} was trained on '{ours.name}'"
    if ours.hidden_size != theirs.hidden_size:
        raise ModelError(
            f"{what} with hidden states of {ours.hidden_size}, and this '{chat.name}' has {theirs.hidden_size}; "
            "name the checkpoint that was made for it"
        )
    if ours.weights != theirs.weights:
        raise ModelError(
            f"{what} (weights {ours.weights}), and the '{chat.name}' found here has other weights "
            f"({theirs.weights}); get that revision ({ours.revision}), or train one on this model"
        )


def load_persrm(folder: Path) -> PersRM:
    """Read a checkpoint's folder.

    Raises:
        ModelNotFoundError: there is none.
        ModelError: a file is cut short or no PersRM's, or its parts do not fit each other.
    """
    try:
        if not (folder / CARD).is_file():
            raise ModelNotFoundError(
                f"no PersRM in '{folder}': it holds no {CARD}; name the folder that 'prefmw train persrm' wrote"
            )
        card = _read_card(folder)
        is_there = (folder / WEIGHTS).is_file() or card.head != "linear"
        tensors = read_tensors(folder / WEIGHTS, "PersRM") if is_there else {}
        linear = _read_linear(folder, card, tensors) if card.head == "linear" else None
    except OSError as error:
        raise ModelError(f"the PersRM in '{folder}' cannot be read: {error.strerror or error}") from error
    lora = lora_among(tensors, folder, "PersRM")
    size = card.backbone.hidden_size
    expected = {"scale": {"W": (size, size), "mean": (size,), "deviation": (size,)}}.get(card.head, {})
    for name, shape in expected.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape:
            raise ModelError(f"the PersRM in '{folder}' needs {name} of shape {shape}, got {got or 'none'}")
    kept = {name: tensors[name].float() for name in expected}
    check_numbers(list(kept.values()), folder, "PersRM")
    return PersRM(card, fingerprint(folder), lora, kept.get("W"), kept.get("mean"), kept.get("deviation"), linear)


def save_persrm(folder: Path, persrm: PersRM, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint, the card last, so that a folder with a card is whole."""
    tensors = {
        name: tensor
        for name, tensor in (("W", persrm.weight), ("mean", persrm.mean), ("deviation", persrm.deviation))
        if tensor is not None
    }
    if persrm.linear is not None:
        tensors |= {"head.weight": persrm.linear.weight, "head.bias": persrm.linear.bias}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS, persrm.lora, tensors, dtype)
    (folder / CARD).write_text(persrm.card.to_json(), encoding="utf-8")


@torch.no_grad()
def meaning_of(text: str, chat: ChatModel) -> Tensor | None:
    """The mean of the backbone's last hidden states over a text's tokens, (D,), float32; ``None`` of an empty text.

    The text stands alone: no template, no LoRA. Of one beyond the model's context the beginning counts.
    """
    ids = chat.template.encode_reply(text)[: chat.capacity] if text.strip() else []
    if not ids:
        return None
    tokens = torch.tensor([ids], device=chat.device)
    states: Tensor = chat.module.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # (1, T, D)
    return states[0].float().mean(0).cpu()


def weights_digest(module: Any) -> str:
    """Twelve hex digits that tell a model's weights from another's, whatever folder or hub they came from: names and
    shapes of its tensors, and some numbers of each in bfloat16, so that the type they were loaded in hardly matters.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:".encode())
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(0, len(flat) - 1), min(_SAMPLED, len(flat))).long()
        sample = flat[places.to(flat.device)].cpu().to(torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def _read_card(folder: Path) -> Card:
    try:
        table = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if table.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        table["backbone"], table["prefix"] = BackboneCard(**table["backbone"]), Prefix(**table["prefix"])
        card = Card(**table)
        if card.head not in ("scale", "none", "linear") or card.reference not in ("backbone", "base"):
            raise ValueError("its head or its reference is of no known kind")
    except (ValueError, TypeError, KeyError, AttributeError, UsageError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"'{folder / CARD}' is no PersRM's card, or is cut short: {reason}") from error
    return card


def _read_linear(folder: Path, card: Card, tensors: Mapping[str, Tensor]) -> nn.Linear:
    """The released head: a PyTorch file's weight (D, D) and bias (D,), under whatever prefix, or the safetensors'."""
    found: Mapping[str, Any] = tensors
    if card.head_file:
        path = folder / card.head_file
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ModelError(f"the PersRM in '{folder}' lacks {card.head_file}; copy the whole folder") from error
        except Exception as error:  # torch and pickle raise what they like
            raise ModelError(
                f"'{path}' cannot be read as weights alone; it may be cut short: {' '.join(str(error).split())[:200]}"
            ) from error
    size, parts = card.backbone.hidden_size, {}
    for part, shape in (("weight", (size, size)), ("bias", (size,))):
        named = [
            tensor
            for name, tensor in found.items()
            if name == part or name.endswith(f"head.{part}") or (name.endswith(f".{part}") and card.head_file)
        ]
        if len(named) != 1 or tuple(named[0].shape) != shape:
            got = ", ".join(str(tuple(tensor.shape)) for tensor in named) or "none"
            raise ModelError(f"the linear head of '{folder}' needs one {part} of shape {shape}, got {got}")
        parts[part] = named[0].float()
    linear = nn.Linear(size, size)
    linear.load_state_dict(parts)
    return linear.requires_grad_(False).eval()
