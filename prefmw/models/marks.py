"""Marks that stand for contents while a chat template is rendered, so that it is known whose each character is.

A template may print a content as it is or as a JSON string (tool results, names, arguments). A mark holds a backslash,
which JSON doubles: how many backslashes come out tells how a content is to be written in its place.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from typing import NamedTuple

Rendered = list[tuple[str, bool]]
"""A prompt in pieces: (text, whether it is somebody's content rather than the template's)."""


class _Content(NamedTuple):
    text: str
    is_json: bool
    needed: bool


class Marks:
    """The marks of one rendering."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(8)
        self._contents: list[_Content] = []
        self._pattern = re.compile(rf"x{self._nonce}(\\+)(\d+)x")

    def of(self, content: str, *, needed: bool = True) -> str:
        """``content`` with a mark in its place. White space around it stays, so that a template that trims still does.

        ``needed``: a prompt without it is none.
        """
        core = content.strip()
        return content.replace(core, self._mark(_Content(core, False, needed)), 1) if core else content

    def of_json(self, text: str) -> str:
        """A mark for JSON, which a template may print quoted as a string or bare."""
        return self._mark(_Content(text, True, True))

    def split(self, rendered: str) -> Rendered:
        """The rendering with the contents back in their places.

        Raises:
            ValueError: it leaves out a content that is needed, or writes it twice.
        """
        pieces: Rendered = []
        found: Counter[int] = Counter()
        position = 0
        for match in self._pattern.finditer(rendered):
            index = int(match[2])
            content, escapes = self._contents[index], len(match[1]).bit_length() - 1
            start, end = match.span()
            text = content.text
            if content.is_json and escapes:  # printed as a string, quotes and all
                start, end = start - 1, end + 1
            for _ in range(0 if content.is_json else escapes):
                text = json.dumps(text, ensure_ascii=False)[1:-1]
            pieces += [(rendered[position:start], False), (text, True)]
            position = end
            found[index] += 1
        pieces.append((rendered[position:], False))
        if any(content.needed and found[index] != 1 for index, content in enumerate(self._contents)):
            raise ValueError("leaves out a message or writes one twice")
        return [(text, is_content) for text, is_content in pieces if text]

    def _mark(self, content: _Content) -> str:
        self._contents.append(content)
        return f"x{self._nonce}\\{len(self._contents) - 1}x"
