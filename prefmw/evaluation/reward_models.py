"""Rewards of finished replies: any sequence classification model of Hugging Face, and what needs no model at hand.

A reward is a function from replies to numbers; higher is better for whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from prefmw.errors import ModelError, ModelNotFoundError, UsageError
from prefmw.evaluation.held_out import Item
from prefmw.evaluation.second_opinion import SecondOpinion
from prefmw.preferences import Dimensions, Message
from prefmw.scoring import Exchange, attribute_scores, scored_dimensions
from prefmw.steering import Backend

BATCH = 16
"""Replies that a reward model reads at once."""


class Said(NamedTuple):
    """A reply to a question; ``item`` where the question is a held-out one."""

    question: str
    reply: str
    item: Item | None


Reward = Callable[[Sequence[Said]], list[float]]


def reward_model(source: str, output: int | None, template: str | None = None, device: str = "auto") -> Reward:
    """A sequence classification model, by folder or hub id, as reward.

    It reads ``template`` with ``{prompt}`` and ``{response}`` filled in; without one, question and reply in its
    tokenizer's chat template, where there is one, and else as a pair of texts. Of several outputs ``output`` is the
    reward; by default the only one, or of two the second, as classifiers have it.

    Raises:
        ModelNotFoundError: it is not to be found.
        ModelError: it cannot be loaded.
        UsageError: it has several outputs and none was chosen, or not so many; or the template has no {response}.
    """
    if template is not None and "{response}" not in template:
        raise UsageError("a reward model's template holds {response}, and {prompt} where it reads that too")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    except OSError as error:
        raise ModelNotFoundError(f"no reward model '{source[:80]}': no such folder here, nor on the hub") from error
    except Exception as error:  # transformers raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the reward model '{source[:80]}' cannot be loaded: {reason}") from error
    count = int(model.config.num_labels)
    place = output if output is not None else {1: 0, 2: 1}.get(count)
    if place is None or not 0 <= place < count:
        raise UsageError(f"'{source[:80]}' has {count} outputs; choose one, as in NAME={source[:40]}:0")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    target = torch.device(
        "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    )
    model.to(target)

    def read(said: Sequence[Said]) -> Any:
        longest = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 1 << 20)))
        options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": longest}
        if template is not None:
            filled = [template.replace("{prompt}", one.question).replace("{response}", one.reply) for one in said]
            return tokenizer(filled, **options)
        if getattr(tokenizer, "chat_template", None):
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": one.question}, {"role": "assistant", "content": one.reply}],
                    tokenize=False,
                )
                for one in said
            ]
            return tokenizer(texts, add_special_tokens=False, **options)
        return tokenizer([one.question for one in said], [one.reply for one in said], **options)

    @torch.inference_mode()
    def reward(said: Sequence[Said]) -> list[float]:
        scores: list[float] = []
        for at in range(0, len(said), BATCH):
            scores += model(**read(said[at : at + BATCH]).to(target)).logits[:, place].float().tolist()
        return scores

    return reward


def zero_shot(backend: Backend, dimensions: Dimensions) -> Reward:
    """The chat model's own attribute scores towards the poles that a held-out item asks for, nats a token."""
    keys = scored_dimensions(dimensions)

    def reward(said: Sequence[Said]) -> list[float]:
        exchanges = [Exchange([Message("user", one.question)], one.reply or "…") for one in said]
        scores = attribute_scores(exchanges, backend, dimensions)
        return [
            float(sum(row[keys.index(axis)] * sign for axis, sign in wanted.items()) / len(wanted))
            for row, wanted in zip(scores, map(_wanted, said), strict=True)
        ]

    return reward


def second_opinion() -> Reward:
    """A classifier of styles on sentence embeddings, in [-1, 1], towards the poles that a held-out item asks for."""
    classifier = SecondOpinion()

    def reward(said: Sequence[Said]) -> list[float]:
        read = classifier.measure([one.reply for one in said])
        return [
            float(sum(read[axis][index] * sign for axis, sign in wanted.items()) / len(wanted))
            for index, wanted in enumerate(map(_wanted, said))
        ]

    return reward


def _wanted(said: Said) -> dict[str, int]:
    if said.item is None:
        raise UsageError("this reward judges held-out questions alone; name reward models with --reward NAME=MODEL")
    return said.item.wanted
