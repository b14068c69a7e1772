"""The embedded model's tokenizer: byte-level BPE with a ChatML template that has a system role."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefmw.preferences import Message

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's word boundaries, digits one by one."""


def train_tokenizer(texts: Iterable[str], *, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Learn ``vocabulary`` tokens, control tokens and all 256 bytes among them, from ``texts``.

    Any text can be encoded, and decoding gives it back byte for byte.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def encode_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """A whole conversation as token ids, and which of them the assistant says, the end of its turn included."""
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    (newline,) = _ids("\n", tokenizer)
    ids: list[int] = []
    said: list[bool] = []
    for message in messages:
        head = [start, *_ids(f"{message.role}\n", tokenizer)]
        body = [*_ids(message.content, tokenizer), end]
        ids += [*head, *body, newline]
        said += [False] * len(head) + [message.role == "assistant"] * len(body) + [False]
    return ids, said


def _ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
