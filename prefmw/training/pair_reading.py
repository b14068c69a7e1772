"""Preference pairs as token ids, and what a model makes of their replies: hidden states and log-probabilities.

Shapes: B replies, T tokens, N tokens of several replies one behind the other, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefmw.models import ChatModel
from prefmw.models.persrm import Prefix
from prefmw.training.pairs import Pair

AT_ONCE = 8192
"""Tokens, padding included, of a forward that learns nothing."""

HEAD_AT_ONCE = 1 << 25
"""Logits held at once."""


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids, each reply with the end of its turn, and the number of its preference text."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    preference: int
    group: str


def encode_pairs(
    pairs: Sequence[Pair], chat: ChatModel, prefix: Prefix, max_tokens: int, preferences: dict[str, int]
) -> tuple[list[EncodedPair], Counter[str]]:
    """The pairs behind their preference's prefix, and how many were left out because prompt and reply together exceed
    ``max_tokens``. ``preferences`` numbers the texts; new ones are added.
    """
    end = min(chat.template.end_of_turn or chat.stop_ids)
    encoded, left_out = [], Counter[str]()
    for pair in pairs:
        prompt = chat.template.encode(prefix.applied(pair.messages, pair.preference, chat.template.default_system))
        replies = [[*chat.template.encode_reply(text), end] for text in (pair.chosen, pair.rejected)]
        if len(prompt) + max(map(len, replies)) > max_tokens:
            left_out[f"beyond {max_tokens} tokens"] += 1
            continue
        number = preferences.setdefault(pair.preference, len(preferences))
        encoded.append(EncodedPair(prompt, replies[0], replies[1], number, pair.group))
    return encoded, left_out


def head_logits(module: Any, hidden: Tensor) -> Tensor:
    """Logits (N, V), float32, of hidden states (N, D) after the final norm: the output embeddings with their bias, and
    the scale and soft cap that some architectures put behind them.
    """
    config = module.config.get_text_config()
    head = module.get_output_embeddings()
    logits: Tensor = head(hidden.to(head.weight.dtype)).float()
    for name, inverse in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
        if (scale := getattr(config, name, None)) is not None:
            logits = logits / scale if inverse else logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def log_probabilities(module: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of each target token (N,), nats, from the hidden states before them (N, D)."""
    room = max(1, HEAD_AT_ONCE // int(module.get_output_embeddings().weight.shape[0]))
    parts = []
    for at in range(0, len(targets), room):
        logits = head_logits(module, hidden[at : at + room])
        parts.append(logits.gather(1, targets[at : at + room, None]).squeeze(1) - logits.logsumexp(1))
    return torch.cat(parts)


@torch.no_grad()
def reply_states(module: Any, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> list[Tensor]:
    """The hidden states (T, D) from which each reply's tokens are foretold, of one forward."""
    whole = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    width = max(map(len, whole))
    device = module.get_input_embeddings().weight.device
    tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in whole], device=device)
    # Causal attention never looks behind a row, so no mask is needed.
    states = module.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return [
        states[row, len(prompt) - 1 : len(prompt) + len(reply) - 1]
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]


def batches_by_length(pairs: Sequence[EncodedPair], tokens: int = AT_ONCE) -> Iterator[list[int]]:
    """Indices of pairs of like lengths, as many as two replies each make at most ``tokens``, at least one."""

    def length(index: int) -> int:
        pair = pairs[index]
        return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))

    batch: list[int] = []
    for index in sorted(range(len(pairs)), key=length):
        if batch and 2 * (len(batch) + 1) * length(index) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def pair_log_probabilities(
    module: Any,
    pairs: Sequence[EncodedPair],
    scales: Tensor | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """log p of chosen and rejected replies, (pairs, 2), nats, summed over their tokens; ``scales`` are w_p by number of
    preference text, (P, D).
    """
    found = torch.zeros(len(pairs), 2)
    for batch in batches_by_length(pairs):
        prompts = [pairs[index].prompt for index in batch for _ in range(2)]
        replies = [reply for index in batch for reply in (pairs[index].chosen, pairs[index].rejected)]
        states = reply_states(module, prompts, replies)
        if scales is not None:
            weights = [scales[pairs[index].preference] for index in batch for _ in range(2)]
            states = [state * weight.to(state) for state, weight in zip(states, weights, strict=True)]
        targets = torch.tensor([token for reply in replies for token in reply], device=states[0].device)
        each = log_probabilities(module, torch.cat(states), targets).cpu()
        sums = torch.stack([part.sum() for part in torch.split(each, [len(reply) for reply in replies])])
        found[batch] = sums.view(-1, 2)
        progress(len(batch))
    return found
