"""Small deterministic chat models, made from a seed: random weights, a real tokenizer, a real chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefmw.models.persrm import BackboneCard, Card, PersRM

SENTENCES = [
    "How do I fall asleep faster? Keep the room dark and cool, and put the phone away an hour before bed.",
    "The person who asked the question is a nurse, your answer needs to take his(her) needs into account.",
    "Keep the answer short and to the point. Give a long answer with plenty of detail. Be funny and add a joke or two.",
    "You are a helpful assistant. What should I cook tonight? Try rice with lentils, onions and a squeeze of lemon.",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = (  # ChatML that writes a system prompt of its own where there is none
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)

HERMES = (  # ChatML that takes tools; a call stands between control tokens, an answer in a user's turn
    "{% if tools or messages[0].role == 'system' %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% if tools %}{{ '\\n\\n' }}# Tools\n<tools>{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\\n' }}</tools>\n"
    'Call one as <tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>{% endif %}<|im_end|>\n{% endif %}'
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA31 = (  # Llama 3 that takes tools: one call a message, in place of its content; answers quoted as JSON
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n{{ system | trim }}"
    '{% if tools %}\nReply with {"name": function, "parameters": arguments}.'
    "{% for tool in tools %}\n{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}<|eot_id|>"
    "{% for m in messages if m.role != 'system' %}"
    "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

FAMILIES: dict[str, tuple[str, list[str], str, str | None]] = {
    # name: (template, control tokens, end of turn, beginning of sequence)
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>", None),
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>", None),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "<s>"),
    "hermes": (HERMES, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>", None),
    "llama31": (
        LLAMA31,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "<bos>"),
}


def make_tokenizer(family: str = "chatml") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, or for mistral and gemma one of SentencePiece's kind, with the family's template."""
    template, control, end_of_turn, bos = FAMILIES[family]
    if family in {"mistral", "gemma"}:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        if family == "mistral":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            backend.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        else:
            backend.normalizer = normalizers.Replace(" ", "▁")
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *control, *bytes_], show_progress=False)
        backend.train_from_iterator([text for text in SENTENCES for text in text.split(". ")], trainer)
        for token in bytes_:  # bytes are vocabulary, not added tokens
            assert backend.token_to_id(token) is not None
        backend = _without_added(backend, set(bytes_))
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=control,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end_of_turn, bos_token=bos, additional_special_tokens=control
    )
    if family == "hermes":  # control tokens that are no special ones, and so part of a reply's text
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    return tokenizer


def _without_added(backend: Tokenizer, names: set[str]) -> Tokenizer:
    import json

    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(state))


def make_model(vocabulary: int, *, context: int = 512, seed: int = 0) -> LlamaForCausalLM:
    """A two-layer Llama with random weights, large enough that contexts matter to its logits."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_chat_model(folder: Path, family: str = "chatml", *, context: int = 512, seed: int = 0) -> Path:
    """A chat model as a folder that transformers loads."""
    tokenizer = make_tokenizer(family)
    model = make_model(len(tokenizer), context=context, seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spoiled(model: Path, folder: Path) -> Path:
    """A copy of a chat model, one of whose weights is infinite."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_persrm(chat: Any, *, size: float = 0.5, seed: int = 0) -> PersRM:
    """A PersRM on a chat model, made from a seed: a LoRA on all its linear layers but the head, and a W, large enough
    that both matter to its logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lora = {
        name: (drawn(4, layer.in_features) * size / 4, drawn(layer.out_features, 4) * size / 4)
        for name, layer in chat.module.named_modules()
        if type(layer) is torch.nn.Linear and not name.endswith("lm_head")
    }
    card = Card("toy-persrm", BackboneCard.of(chat))
    width = card.backbone.hidden_size
    weight = drawn(width, width) * size / width**0.5
    return PersRM(card, f"seed{seed}", lora, weight, drawn(width) * 0.1, drawn(width).abs() + 0.5)
