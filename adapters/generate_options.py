"""What ``generate`` was asked for, and which of it Linear Alignment honours: the rest is refused by name.

An option that is set away from its default and would change nothing here is an error, whether a call sets it or the
model's own generation config; so is an argument of ``generate`` that would otherwise be dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefmw.errors import UsageError

HONOURED = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "eos_token_id",
    "pad_token_id",
)
"""Options that do here what they do in ``generate``."""

UNCONCERNED = {
    "bos_token_id": "read by generate only where there is no prompt",
    "decoder_start_token_id": "read by encoder-decoder models only",
    "disable_compile": "nothing is compiled",
    "transformers_version": "no option",
}
"""Options that may have any value, since there is nothing that they could do here; and why."""

SAMPLED = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Further options that act in ``generate`` only where it samples: a greedy call is not refused for them."""

NEUTRAL: dict[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "use_cache": True,
    "cache_implementation": "dynamic",
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
"""Where an option does nothing in ``generate``, beside ``None``; of all others that is ``None`` and ``False``."""

ARGUMENTS = (
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
"""Arguments of ``generate`` itself that it hands to no callable."""

INPUTS = ("input_ids", "attention_mask")
"""Of what ``generate`` hands the model, what is read here."""

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


def generate_call() -> dict[str, Any] | None:
    """The arguments of the ``generate`` that called us, by name, its ``kwargs`` among them; ``None`` where none did.

    They are read from its frame, since transformers 5 hands a callable neither the streamer nor :data:`ARGUMENTS`, and
    drops a mask that is all ones whatever its shape.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    if frame is None:
        return None
    names = ("streamer", *ARGUMENTS)
    return {**{name: frame.f_locals.get(name) for name in names}, **frame.f_locals.get("kwargs", {})}


def check_options(config: GenerationConfig) -> None:
    """Raise UsageError for options that are set and not honoured."""
    refused = []
    for name in vars(GenerationConfig()):
        if name.startswith("_") or name in (*HONOURED, *UNCONCERNED) or (name in SAMPLED and not config.do_sample):
            continue
        value = getattr(config, name, None)
        unset = value is None or (value == NEUTRAL[name] if name in NEUTRAL else value is False)
        if not unset:
            refused.append(name)
    if refused:
        raise UsageError(
            f"linear_alignment honours {', '.join(HONOURED)}, not {', '.join(refused)}: leave that at its default, "
            "from which the model's own generation config may have moved it"
        )


def check_processors(given: Iterable[Any], config: GenerationConfig) -> None:
    """Raise UsageError for logits processors and stopping criteria other than those that options stand for."""
    if unknown := [type(one).__name__ for one in given if not _is_configured(one, config)]:
        raise UsageError(
            "linear_alignment takes temperature, top-p, top-k, length and end tokens, as options, not "
            + ", ".join(unknown)
        )


def check_call(call: Mapping[str, Any] | None, model_kwargs: Mapping[str, Any]) -> None:
    """Raise UsageError for arguments of a ``generate`` call that nothing here reads."""
    given = model_kwargs if call is None else call  # generate adds some of its own
    names = [*ARGUMENTS, *(name for name in model_kwargs if name not in INPUTS)]
    if refused := [name for name in names if given.get(name) is not None and given.get(name) is not False]:
        raise UsageError(f"linear_alignment reads token ids and their attention mask, not {', '.join(refused)}")


def check_prompts(ids: Any, mask: Any, what: str) -> None:
    """Raise UsageError for prompts that are no token ids (B, T), B and T above 0, for a mask of another shape, and for
    one that hides a whole prompt; ``what`` names the argument.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or 0 in ids.shape:
        got = f"shape {tuple(ids.shape)}, {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UsageError(f"{what} are token ids, (prompts, tokens) and at least one of each, got {got}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        got = f"{tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UsageError(f"the attention mask of {what} has their shape {tuple(ids.shape)}, got {got}")
    if not mask.bool().any(dim=1).all():
        raise UsageError(f"the attention mask of {what} leaves every prompt a token; one has none")


def _is_configured(one: Any, config: GenerationConfig) -> bool:
    """Whether it is what ``generate`` makes of an option that is honoured, and not one of the caller's beside it."""
    match one:
        case TemperatureLogitsWarper():
            return bool(config.do_sample and one.temperature == config.temperature)
        case TopKLogitsWarper():
            return bool(config.do_sample and one.top_k == config.top_k)
        case TopPLogitsWarper():
            return bool(config.do_sample and one.top_p == config.top_p)
        case MaxLengthCriteria():
            return bool(one.max_length == config.max_length)
        case EosTokenCriteria():
            return set(one.eos_token_id.tolist()) == set(end_tokens(config))
    return False


def end_tokens(config: GenerationConfig) -> list[int]:
    """The tokens that end a reply."""
    ends = config.eos_token_id
    if isinstance(ends, Tensor):
        ends = ends.tolist()
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]
