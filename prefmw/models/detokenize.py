"""Token ids to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_HELD = 32
"""Tokens held back at most for a character's end: a longer run is not text that any further token would mend."""


class Detokenizer:
    """Turns one reply's token ids into pieces of text.

    A character may span tokens, and a stop string may span pieces, so text is held back while it could still turn out
    to be the middle of either. The pieces joined are the same text however the tokens arrive.

    Args:
        tokenizer: a transformers tokenizer.
        stop: strings that end the reply; neither they nor what follows them is given out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._settled = 0  # ids whose text is in _text
        self._context = 0  # ids decoded together with the next ones, since a tokenizer may join neighbours with a space
        self._text = ""
        self._given = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text given out so far."""
        return self._text[: self._given]

    def push(self, token: int) -> str:
        """Take one token; return the text that is now certain, perhaps none. Sets ``stopped`` at a stop string."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._settled])
        after = self._decode(self._ids[self._context :])
        broken = after.endswith("\ufffd") and len(self._ids) - self._settled < MAX_HELD
        if len(after) <= len(before) or broken:
            return ""  # the middle of a character, or a token without text
        self._add(after[len(before) :])
        self._context, self._settled = self._settled, len(self._ids)
        return self._give(hold=True)

    def finish(self) -> str:
        """No more tokens: return what was held back."""
        if not self.stopped:
            before = self._decode(self._ids[self._context : self._settled])
            self._add(self._decode(self._ids[self._context :])[len(before) :])
        return self._give(hold=False)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).replace("\0", "\ufffd")  # no store and no message holds a NUL

    def _add(self, piece: str) -> None:
        start = max(0, len(self._text) - max((len(stop) for stop in self._stop), default=0))
        self._text += piece
        found = [at for stop in self._stop if (at := self._text.find(stop, start)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _give(self, *, hold: bool) -> str:
        end = len(self._text)
        if hold and not self.stopped:
            end -= max((_overlap(self._text, stop) for stop in self._stop), default=0)
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that begins ``stop``."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
