"""Linear Alignment inside transformers' own ``generate``, for those who have a model and want nothing else of prefmw.

::

    from prefmw.adapters.transformers import linear_alignment

    plain = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    steered = tokenizer.apply_chat_template([system, *chat], ..., return_dict=True)
    model.generate(**plain, custom_generate=linear_alignment, principle_input_ids=steered["input_ids"], ratio=2.0,
                   do_sample=True, temperature=0.7, max_new_tokens=200)

Options that have no place in it are refused, see :mod:`prefmw.adapters.generate_options`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from prefmw.adapters.generate_options import (
    check_call,
    check_options,
    check_processors,
    check_prompts,
    end_tokens,
    generate_call,
)
from prefmw.alignment import combine_linear
from prefmw.decoding import Engine, Generation, Request, Sampling, View
from prefmw.errors import UsageError
from prefmw.preferences import check_strength

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that gave in rows what they give by themselves."""


def linear_alignment(
    model: Any,
    input_ids: Tensor,
    *,
    generation_config: GenerationConfig,
    principle_input_ids: Tensor,
    principle_attention_mask: Tensor | None = None,
    ratio: float = 2.0,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """A decoding method for ``model.generate(..., custom_generate=linear_alignment)``.

    Args:
        model: a causal language model.
        input_ids: prompts without the principle, (B, T).
        generation_config: as ``generate`` prepared it: sampling or greedy, temperature, top-p, top-k, length, end and
            padding tokens. A top-p of 1 or none stands for 0.8, since Linear Alignment trusts only a nucleus.
        principle_input_ids: the same prompts with the principle, (B, T').
        principle_attention_mask: 0 where those are padding, (B, T').
        ratio: the strength, 0 to 10; 0 is preference prompting.
        logits_processor: beyond temperature, top-p and top-k none is taken.
        stopping_criteria: beyond length and end tokens none is taken.
        streamer: gets every step's tokens, (B,), padding for replies that have ended, and is told of the end; by
            default the one that ``generate`` was given, which has put the prompts already.
        model_kwargs: what ``generate`` would hand the model; of it, ``attention_mask`` (B, T) is read.

    Returns:
        ``input_ids`` followed by the replies, padded on the right, (B, T + longest reply).

    Raises:
        UsageError: prompts that are not in pairs or not of their mask's shape, an option or an argument that this
            method does not honour.
        ContextLengthError: a prompt and its reply exceed the model's context.
        ModelError: a model whose past cannot be kept in rows; looked at before its first reply.

    Source: Gao et al., Eq. 16-18, in the released form; see :func:`prefmw.alignment.scaled`.
    """
    call = generate_call()
    streamer = streamer or (call or {}).get("streamer")
    mask = (call or {}).get("attention_mask")
    mask = model_kwargs.get("attention_mask") if mask is None else mask
    check_options(generation_config)
    check_call(call, model_kwargs)
    check_processors([*(logits_processor or ()), *(stopping_criteria or ())], generation_config)
    check_prompts(input_ids, mask, "input_ids")
    check_prompts(principle_input_ids, principle_attention_mask, "principle_input_ids")
    if principle_input_ids.shape[0] != input_ids.shape[0]:
        raise UsageError(
            f"{input_ids.shape[0]} prompts and {principle_input_ids.shape[0]} with a principle: one of each is expected"
        )
    strength = check_strength("linear", ratio)
    if generation_config.max_length is None:
        raise UsageError(
            "linear_alignment is handed to generate, as custom_generate, which says how long a reply may be"
        )
    length = generation_config.max_length - input_ids.shape[1]
    seeds = torch.randint(2**62, (len(input_ids),)).tolist() if generation_config.do_sample else [0] * len(input_ids)
    without = _prompts(input_ids, mask)
    steered = _prompts(principle_input_ids, principle_attention_mask)
    ends = end_tokens(generation_config)
    config = model.config.get_text_config()
    engine = Engine(
        model,
        capacity=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        queue_size=len(input_ids),
        pack=False,  # for a reply or two, copying the weights takes longer than it saves
    )
    try:
        if model not in _checked:
            engine.self_check()
            _checked.add(model)
        generations = [
            engine.submit(
                Request(
                    (View(one), View(other)),
                    combine_linear,
                    _sampling(generation_config, length, seed),
                    (float(strength or 0.0),),
                    frozenset(ends),
                )
            )
            for one, other, seed in zip(without, steered, seeds, strict=True)
        ]
        padding = generation_config.pad_token_id
        padding = (ends or [0])[0] if padding is None else padding
        steps = []
        for drawn in zip_longest(*map(_said, generations), fillvalue=padding):
            steps.append(torch.tensor(drawn))  # (B,)
            if streamer is not None:
                streamer.put(steps[-1])
    finally:
        engine.close()
    if streamer is not None:
        streamer.end()
    return torch.cat([input_ids, torch.stack(steps, dim=1).to(input_ids)], dim=1)


def _prompts(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The prompts without their padding."""
    seen = torch.ones_like(ids) if mask is None else mask
    return [row[kept.bool()].tolist() for row, kept in zip(ids.cpu(), seen.cpu(), strict=True)]


def _sampling(config: GenerationConfig, length: int, seed: int) -> Sampling:
    temperature = (1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0
    top_p = config.top_p if config.do_sample and config.top_p is not None and config.top_p < 1 else 0.8
    top_k = config.top_k or None if config.do_sample else None
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=length, seed=seed)


def _said(generation: Generation) -> Iterator[int]:
    """One reply with its end token, as ``generate`` gives it."""
    yield from generation
    if generation.stop_id is not None:
        yield generation.stop_id
