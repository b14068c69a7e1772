"""Tiny random models of every architecture that the slot cache is proven on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 160
WINDOW = 12

_ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_SIZES: dict[str, dict[str, Any]] = {
    "llama": _ROTARY,
    "qwen2": _ROTARY,
    "qwen2 sliding": {**_ROTARY, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": _ROTARY,
    "mistral": {**_ROTARY, "sliding_window": WINDOW},
    "phi3": {**_ROTARY, "sliding_window": WINDOW},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
    },
    "olmo2": _ROTARY,
    "gemma": _ROTARY,
    "gemma2": {**_ROTARY, "sliding_window": WINDOW},
    "gemma3_text": {**_ROTARY, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "smollm3": {
        **_ROTARY,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}
FAMILIES = list(_SIZES)


def family(name: str, seed: int = 0) -> Any:
    """A model of that architecture with random weights large enough that its choices are clear."""
    torch.manual_seed(seed)
    kind = name.split()[0]
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **_SIZES[name])
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * 0.15)
    return model
