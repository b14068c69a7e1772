"""Linear Alignment inside transformers' own ``generate``, for those who have a model and want nothing else of prefmw.

::

    from prefmw.adapters.transformers import linear_alignment

    plain = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    steered = tokenizer.apply_chat_template([system, *chat], ..., return_dict=True)
    model.generate(**plain, custom_generate=linear_alignment, principle_input_ids=steered["input_ids"], ratio=2.0,
                   do_sample=True, temperature=0.7, max_new_tokens=200)
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefmw.alignment import combine_linear
from prefmw.decoding import Engine, Generation, Request, Sampling, View
from prefmw.errors import UsageError
from prefmw.preferences import check_strength

_HANDLED = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    EosTokenCriteria,
    MaxLengthCriteria,
)

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
    **model_kwargs: Any,
) -> Tensor:
    """A decoding method for ``model.generate(..., custom_generate=linear_alignment)``.

    Args:
        model: a causal language model.
        input_ids: prompts without the principle, (B, T).
        generation_config: as ``generate`` prepared it: sampling or greedy, temperature, top-p, top-k, length and end
            tokens. A top-p of 1 or none stands for 0.8, since Linear Alignment trusts only a nucleus.
        principle_input_ids: the same prompts with the principle, (B, T').
        principle_attention_mask: 0 where those are padding, (B, T').
        ratio: the strength, 0 to 10; 0 is preference prompting.
        logits_processor: beyond temperature, top-p and top-k none is taken.
        stopping_criteria: beyond length and end tokens none is taken.
        model_kwargs: what ``generate`` would hand the model; of it, ``attention_mask`` (B, T) is read.

    Returns:
        ``input_ids`` followed by the replies, padded on the right, (B, T + longest reply).

    Raises:
        UsageError: prompts that are not in pairs, or an option that this method does not take.
        ModelError: a model whose past cannot be kept in rows; looked at before its first reply.

    Source: Gao et al., Eq. 16-18, in the released form; see :func:`prefmw.alignment.scaled`.
    """
    if generation_config.num_beams not in (None, 1) or generation_config.num_return_sequences not in (None, 1):
        raise UsageError("linear_alignment takes one beam and one sequence a prompt")
    wanted = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if more := [name for name in wanted if getattr(generation_config, name, None)]:
        raise UsageError(f"linear_alignment gives token ids alone, not {', '.join(more)}")
    given = [*(logits_processor or ()), *(stopping_criteria or ())]
    if unknown := [type(one).__name__ for one in given if not isinstance(one, _HANDLED)]:
        raise UsageError(
            f"linear_alignment takes temperature, top-p, top-k, length and end tokens, not {', '.join(unknown)}"
        )
    if principle_input_ids.shape[0] != input_ids.shape[0]:
        raise UsageError(
            f"{input_ids.shape[0]} prompts and {principle_input_ids.shape[0]} with a principle: one of each is expected"
        )
    strength = check_strength("linear", ratio)
    length = generation_config.max_length - input_ids.shape[1]
    seeds = torch.randint(2**62, (len(input_ids),)).tolist() if generation_config.do_sample else [0] * len(input_ids)
    without = _prompts(input_ids, model_kwargs.get("attention_mask"))
    steered = _prompts(principle_input_ids, principle_attention_mask)
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
                    _ends(generation_config),
                )
            )
            for one, other, seed in zip(without, steered, seeds, strict=True)
        ]
        replies = [_said(generation) for generation in generations]
    finally:
        engine.close()
    width = max(map(len, replies))
    padding = generation_config.pad_token_id if generation_config.pad_token_id is not None else 0
    padded = [[*reply, *[padding] * (width - len(reply))] for reply in replies]
    return torch.cat([input_ids, torch.tensor(padded, dtype=torch.long, device=input_ids.device)], dim=1)


def _prompts(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The prompts without their padding."""
    seen = torch.ones_like(ids) if mask is None else mask
    return [row[kept.bool()].tolist() for row, kept in zip(ids.cpu(), seen.cpu(), strict=True)]


def _sampling(config: GenerationConfig, length: int, seed: int) -> Sampling:
    temperature = (1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0
    top_p = config.top_p if config.do_sample and config.top_p is not None and config.top_p < 1 else 0.8
    top_k = config.top_k or None if config.do_sample else None
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=length, seed=seed)


def _ends(config: GenerationConfig) -> frozenset[int]:
    ends = config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _said(generation: Generation) -> list[int]:
    """One reply with its end token, as ``generate`` gives it."""
    said = list(generation)
    return said if generation.stop_id is None else [*said, generation.stop_id]
