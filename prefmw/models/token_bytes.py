"""The bytes that a tokenizer's tokens add to a text, and the tokens of another tokenizer that add the same.

A model of one tokenizer can judge another's candidates where both have a token of the same bytes. The policy:

- a token's bytes are those of its own text, a space in front included; control tokens have none;
- a candidate is judged as the other's token of exactly its bytes; one without such a token is not judged;
- the tokens that end a reply stand for each other;
- what the other model then reads of the reply are its tokens of the same bytes: the one token, or else the longest
  ones that make them up from the left. Bytes that it has no token for are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prefmw.errors import ModelError
from prefmw.models.chat_model import ChatModel


def token_bytes(tokenizer: Any, vocabulary: int) -> list[bytes | None]:
    """What each token below ``vocabulary`` adds to a text; ``None`` of a control token or an unused number.

    Raises:
        ModelError: the tokenizer is of neither kind, byte-level or SentencePiece's.
    """
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"), ensure_ascii=False)
    if "ByteLevel" in decoder:
        spelled = _byte_level
    elif "▁" in decoder or "Metaspace" in decoder:
        spelled = _sentencepiece
    else:
        raise ModelError(
            f"the tokens of {type(tokenizer).__name__} cannot be told by their bytes: expected a byte-level tokenizer "
            "or one of SentencePiece's kind; choose a PersRM whose backbone has the chat model's own tokenizer"
        )
    found: list[bytes | None] = [None] * vocabulary
    added = tokenizer.added_tokens_decoder
    for text, index in tokenizer.get_vocab().items():
        if index >= vocabulary:
            continue
        if index in added:
            special = added[index].special or index in tokenizer.all_special_ids
            found[index] = None if special else str(added[index]).encode()
        else:
            found[index] = spelled(text) or None
    return found


def same_tokens(one: ChatModel, other: ChatModel) -> bool:
    """Whether two models read the same numbers as the same tokens."""
    ends = [chat.template.end_of_turn or chat.stop_ids for chat in (one, other)]
    return one.tokenizer.get_vocab() == other.tokenizer.get_vocab() and ends[0] == ends[1]


class TokenMap:
    """A chat model's tokens in terms of another's.

    Args:
        base: whose tokens are sampled.
        other: whose tokens judge them.

    Attributes:
        columns: for each of the base's tokens the other's of the same bytes, (V,), -1 for none.
    """

    def __init__(self, base: ChatModel, other: ChatModel) -> None:
        theirs = token_bytes(other.tokenizer, other.vocabulary)
        self._numbers: dict[bytes, int] = {}
        for index, text in enumerate(theirs):
            if text is not None:
                self._numbers.setdefault(text, index)
        self._longest = max(map(len, self._numbers), default=1)
        self._texts = token_bytes(base.tokenizer, base.vocabulary)
        end = min(other.template.end_of_turn or other.stop_ids)
        columns = [-1 if text is None else self._numbers.get(text, -1) for text in self._texts]
        for stop in base.stop_ids:
            if stop < len(columns):
                columns[stop] = end
        self.columns: Tensor = torch.tensor(columns)

    def advance(self, token: int) -> Sequence[int]:
        """What the other model reads where the base said ``token``: perhaps nothing."""
        text = self._texts[token]
        found: list[int] = []
        at = 0
        while text is not None and at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._numbers), None)
            if size is not None:
                found.append(self._numbers[text[at : at + size]])
            at += size or 1
        return found


@cache
def _byte_of() -> Mapping[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones for themselves, the others for
    the characters from 256 on, in their order (GPT-2's table).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


def _byte_level(text: str) -> bytes | None:
    table = _byte_of()
    return bytes(table[character] for character in text) if all(character in table for character in text) else None


def _sentencepiece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()
