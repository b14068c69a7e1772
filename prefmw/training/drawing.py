"""The seam between DPA's trainer and what samples for it: token ids in, token ids out, by prefmw's engine or by vLLM.

A :class:`Policy` is opened for one phase of sampling and closed before the next fit, so that two copies of a model are
never held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefmw.alignment import combine_plain
from prefmw.decoding import Adapter, Engine, Request, Sampling, View
from prefmw.decoding.many import decode_all
from prefmw.errors import MissingExtraError, UsageError
from prefmw.models import ChatModel, ModelSpec, load_chat_model
from prefmw.models.lora_files import Lora
from prefmw.rewards import Scorer

SAMPLERS = ("engine", "vllm")
"""What can sample."""


def check_sampler(sampler: str) -> None:
    """Raise UsageError for what cannot sample."""
    if sampler not in SAMPLERS:
        raise UsageError(f"no sampler '{sampler[:40]}'; there is {' and '.join(SAMPLERS)}")


class Ask(NamedTuple):
    """A reply to be drawn: its context as token ids, and its seed."""

    context: list[int]
    seed: int


class Drawn(NamedTuple):
    """A reply that was drawn: its text, and whether it came to its end."""

    text: str
    ended: bool


class Policy(NamedTuple):
    """A model that replies, what it is asked in, and what scores the replies."""

    chat: ChatModel
    draw: Callable[[Sequence[Ask]], list[Drawn]]
    scorer: Scorer


LoadScorer = Callable[[ChatModel, Engine], Scorer]
"""Loads the reward model, on a chat model's engine where that is its backbone."""


@contextmanager
def opened_policy(
    sampler: str,
    spec: ModelSpec,
    lora: Lora | None,
    load_scorer: LoadScorer,
    *,
    temperature: float,
    max_tokens: int,
    scratch: Path,
) -> Iterator[Policy]:
    """A policy to sample from: the chat model ``spec`` names, with a LoRA on it where there is one.

    Args:
        sampler: one of :data:`SAMPLERS`.
        temperature, max_tokens: of every reply; there is no other bound on its tokens.
        scratch: where vLLM's copy of a policy with a LoRA is written.

    Raises:
        MissingExtraError: vLLM is asked for and not installed.
    """
    check_sampler(sampler)
    chat = load_chat_model(spec)
    with Engine(chat.module, capacity=chat.capacity, vocabulary=chat.vocabulary, parked_bytes=0) as engine:
        if sampler == "vllm":
            draw = _by_vllm(chat, lora, temperature, max_tokens, scratch)
        else:
            draw = _by_engine(chat, engine, lora, temperature, max_tokens)
        yield Policy(chat, draw, load_scorer(chat, engine))


def _by_engine(
    chat: ChatModel, engine: Engine, lora: Lora | None, temperature: float, max_tokens: int
) -> Callable[[Sequence[Ask]], list[Drawn]]:
    adapter = "policy" if lora else None
    if lora:
        engine.add_adapter("policy", Adapter(lora))

    def request(ask: Ask) -> Request:
        room = min(max_tokens, chat.capacity - len(ask.context))
        sampling = Sampling(temperature=temperature, top_p=1.0, top_k=None, max_tokens=room, seed=ask.seed)
        return Request((View(ask.context, adapter=adapter),), combine_plain, sampling, (), chat.stop_ids)

    def draw(asks: Sequence[Ask]) -> list[Drawn]:
        said = decode_all((request(ask) for ask in asks), engine)
        return [Drawn(chat.tokenizer.decode(ids, skip_special_tokens=True), ended) for ids, ended in said]

    return draw


def _by_vllm(
    chat: ChatModel, lora: Lora | None, temperature: float, max_tokens: int, scratch: Path
) -> Callable[[Sequence[Ask]], list[Drawn]]:
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise MissingExtraError("sampling by vLLM needs it installed (pip install vllm); training", "train") from error
    source = str(chat.spec.path or chat.spec.name)
    if lora:
        source = str(_merged(chat, lora, scratch))
    model: Any = LLM(model=source, dtype=chat.dtype, max_model_len=chat.capacity)

    def draw(asks: Sequence[Ask]) -> list[Drawn]:
        options = [
            SamplingParams(
                temperature=temperature,
                max_tokens=min(max_tokens, chat.capacity - len(ask.context)),
                seed=ask.seed,
                stop_token_ids=sorted(chat.stop_ids),
            )
            for ask in asks
        ]
        outputs = model.generate([{"prompt_token_ids": ask.context} for ask in asks], options, use_tqdm=False)
        said = [output.outputs[0] for output in outputs]
        return [
            Drawn(chat.tokenizer.decode(one.token_ids, skip_special_tokens=True), one.finish_reason == "stop")
            for one in said
        ]

    return draw


def _merged(chat: ChatModel, lora: Lora, folder: Path) -> Path:
    """The chat model with a LoRA in its weights, as a folder of its own."""
    clean = load_chat_model(chat.spec)
    layers = dict(clean.module.named_modules())
    with torch.no_grad():
        for name, (down, up) in lora.items():
            weight = layers[name].weight
            weight += (up @ down).to(weight)
    clean.module.save_pretrained(folder)
    clean.tokenizer.save_pretrained(folder)
    return folder
