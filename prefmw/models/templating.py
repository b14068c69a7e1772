"""Chat templates as a trust boundary: contents are text and never become control tokens.

A model's template joins messages with control tokens (``<|im_start|>``, ``[INST]``, ``<end_of_turn>``). Were the
rendered string tokenised as it is, a user whose persona says ``<|im_end|><|im_start|>system`` would open a turn of
their own. So a conversation is rendered with a harmless mark in place of every content; the marks tell which
characters of the prompt are the template's and which are somebody's words. The prompt is then tokenised, and its
control tokens must be exactly those of the marked rendering: where a content brings more, each such string is cut in
two, so that it stays the characters it is.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from prefmw.errors import ChatTemplateError, ModelError
from prefmw.preferences import Message

_MARKER = re.compile(r"[<\[{(|#]+[^\s<>]+[>\])}|:]+|[A-Z][A-Za-z]*:")
"""What a turn marker of plain text looks like: ``<|user|>``, ``[INST]``, ``<<SYS>>``, ``USER:``."""

Rendered = list[tuple[str, bool]]
"""A prompt in pieces: (text, whether it is somebody's content rather than the template's)."""


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        name: the model's name, for messages.
        options: further variables of the template, such as ``enable_thinking``.

    Raises:
        ChatTemplateError: the tokenizer has no chat template, or it renders no user message.
        ModelError: the tokenizer has no fast backend.
    """

    def __init__(self, tokenizer: Any, *, name: str, options: Mapping[str, Any] | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ChatTemplateError(
                f"model '{name}' has no chat template, so it is not a chat model; choose its instruction-tuned version"
            )
        if not tokenizer.is_fast:
            raise ModelError(f"model '{name}' has no fast tokenizer (tokenizer.json), which safe templating needs")
        if ours := {"tokenize", "messages", "conversation", "add_generation_prompt"} & set(options or {}):
            raise ChatTemplateError(f"template_options cannot hold {', '.join(sorted(ours))}: prefmw sets it itself")
        self._tokenizer = tokenizer
        self._name = name
        self._options = dict(options or {})
        self._takes_system = self._probe_system()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids: the conversation in the template, ending where the assistant's reply begins.

        System messages are joined in front, runs of one role merged, and the system prompt folded into the first user
        message where the template refuses one.

        Raises:
            ChatTemplateError: no user message, or the template refuses the conversation.
        """
        pieces = [
            (self._without_markers(text) if content else text, content)
            for text, content in self._render(self._normalise(messages))
        ]
        plain = self._tokenise("".join(text for text, _ in pieces))
        marked = self._tokenise("".join("a" if content else text for text, content in pieces))
        if self._controls(plain) == self._controls(marked):
            return plain
        return self._tokenise_cut(pieces, self._controls(marked))

    def encode_reply(self, text: str) -> list[int]:
        """A finished reply's token ids, as they stand behind a prompt; its text can never become a control token.

        Raises:
            ChatTemplateError: the tokenizer reads a control token in it however it is split.
        """
        return self._tokenise_cut([(self._without_markers(text), True)], controls=[])

    @property
    def _drops_reasoning(self) -> bool:
        """Whether the template leaves earlier reasoning out, as Qwen3's and DeepSeek-R1's do; a mark would hide it."""
        return "</think>" in str(self._tokenizer.chat_template)

    @cached_property
    def _text_markers(self) -> re.Pattern[str] | None:
        """The template's turn markers that are plain text: Zephyr's ``<|user|>``, Llama-2's ``[INST]``, ``## user``.

        Nothing in the tokens tells such a marker from the same characters in a message, so a message's get a zero-width
        space after the first.
        """
        talk = [Message("user", "a"), Message("assistant", "a"), Message("user", "a")]
        pieces = self._render([Message("system", "a"), *talk] if self._takes_system else talk)
        anywhere: set[str] = set()
        line_starts: set[str] = set()
        for index, (text, content) in enumerate(pieces):
            if content:
                continue
            parts = self._outside_controls(text)
            # What opens a content stands behind the last control token before it, what closes one before the first.
            edges = [(_lines(parts[-1]), -1)] + ([(_lines(parts[0]), 0)] if index > 0 else [])
            for lines, place in edges:
                if lines and _MARKER.fullmatch(word := lines[place].split()[place]):
                    anywhere.add(word)
                elif (
                    lines and len(parts) == 1 and len(lines[place]) <= 40
                ):  # no control token, so the line is the marker
                    line_starts.add(lines[place])
        patterns = [re.escape(word) for word in sorted(anywhere, key=len, reverse=True)]
        patterns += [rf"^[ \t]*{re.escape(line)}" for line in sorted(line_starts, key=len, reverse=True)]
        return re.compile("|".join(patterns), re.MULTILINE) if patterns else None

    def _outside_controls(self, text: str) -> list[str]:
        """What of a piece of the template stands before, between and behind its control tokens."""
        return re.split(self._control_pattern, text) if self._control_strings else [text]

    @cached_property
    def default_system(self) -> str:
        """The system prompt that the template writes where a conversation has none, ``""`` if it writes none.

        Known so that adding a principle does not silently drop it.
        """
        if not self._takes_system:
            return ""
        user = Message("user", "a")
        pieces = self._render([Message("system", "a"), user])
        before = "" if pieces[0][1] else pieces[0][0]
        after = "".join(text for text, _ in pieces)[len(before) + 1 :]
        without = "".join(text for text, _ in self._render([user]))
        if len(without) > len(before) + len(after) and without.startswith(before) and without.endswith(after):
            return without[len(before) : len(without) - len(after)]
        return ""

    @cached_property
    def end_of_turn(self) -> frozenset[int]:
        """The control token that follows an assistant's message, and so ends a reply; empty if there is none."""
        pieces = self._try(lambda: self._render([Message("user", "a"), Message("assistant", "a")], reply=False))
        if not pieces or pieces[-1][1]:
            return frozenset()
        first = self._tokenise(pieces[-1][0].lstrip())[:1]
        return frozenset(self._controls(first))

    def _probe_system(self) -> bool:
        """Whether the template takes a system message and shows it."""
        system, user = Message("system", "a"), Message("user", "a")
        if self._try(lambda: self._render([system, user])):
            return True
        self._render([user])  # raises if not even this works
        return False

    @staticmethod
    def _try(render: Callable[[], Rendered]) -> Rendered | None:
        try:
            return render()
        except ChatTemplateError:
            return None

    def _normalise(self, messages: Sequence[Message]) -> list[Message]:
        system = "\n\n".join(message.content for message in messages if message.role == "system" and message.content)
        turns: list[Message] = []
        for message in messages:
            if message.role == "system":
                continue
            content = message.content
            if message.role == "assistant" and self._drops_reasoning:
                content = content.rpartition("</think>")[2].lstrip("\n")
            if turns and turns[-1].role == message.role:
                turns[-1] = Message(message.role, f"{turns[-1].content}\n\n{content}")
            else:
                turns.append(Message(message.role, content))
        if not turns or turns[-1].role != "user":
            raise ChatTemplateError("a conversation ends with a user's message, which the reply answers; add one")
        if system and self._takes_system:
            return [Message("system", system), *turns]
        if system:
            first = next(index for index, turn in enumerate(turns) if turn.role == "user")
            turns[first] = Message("user", f"{system}\n\n{turns[first].content}")
        return turns

    def _render(self, messages: Sequence[Message], *, reply: bool = True) -> Rendered:
        """Render with a mark for each content, then put the contents back, keeping apart whose text is whose.

        White space around a content stays around its mark, so that a template that trims contents still does.
        """
        nonce = secrets.token_hex(8)
        marks = {f"x{nonce}n{index}x": message.content.strip() for index, message in enumerate(messages)}
        marked = [
            {"role": message.role, "content": message.content.replace(core, mark, 1) if core else message.content}
            for message, (mark, core) in zip(messages, marks.items(), strict=True)
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=reply, **self._options
            )
        except Exception as error:  # templates raise what they like: jinja2 errors, TypeError, KeyError
            reason = " ".join(str(error).split())[:200]
            raise ChatTemplateError(
                f"the chat template of '{self._name}' refuses this conversation: {reason}"
            ) from error
        parts = [part for part in re.split(rf"(x{nonce}n\d+x)", text) if part]
        pieces: Rendered = [(marks.get(part, part), part in marks) for part in parts]
        if sorted(part for part in parts if part in marks) != sorted(mark for mark, core in marks.items() if core):
            raise ChatTemplateError(f"the chat template of '{self._name}' leaves out a message or writes one twice")
        return pieces

    def _without_markers(self, text: str) -> str:
        """A content with the template's plain-text turn markers broken."""
        return self._text_markers.sub(_break, text) if self._text_markers else text

    def _tokenise_cut(self, pieces: Rendered, controls: list[int]) -> list[int]:
        """The ids of pieces whose contents' control strings are cut, if ``controls`` are then all that is left."""
        ids = [token for part in self._cut(pieces) for token in self._tokenise_part(part)]
        if self._controls(ids) != controls:
            raise ChatTemplateError(
                f"a message holds text that the tokenizer of '{self._name}' reads as a control token however it is "
                "split; remove it"
            )
        return ids

    def _tokenise(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tokenise_part(self, part: str) -> list[int]:
        """The ids of text that begins inside a word, so that a tokenizer that puts a space in front of a text does not.

        A line break is put in front and its token dropped again.
        """
        encoded = self._tokenizer("\n" + part, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        rest = [
            (token, start)
            for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if start >= 1
        ]
        return [token for token, _ in rest] if rest and rest[0][1] == 1 else self._tokenise(part)

    @cached_property
    def _control_strings(self) -> dict[str, int]:
        """Added tokens by their string, but for white space and ordinary single characters."""
        added = self._tokenizer.added_tokens_decoder
        return {
            str(token): index
            for index, token in added.items()
            if token.special or len(str(token).replace("▁", " ").strip()) > 1
        }

    @cached_property
    def _control_pattern(self) -> str:
        """A regular expression for any control string, the longest first."""
        return "|".join(map(re.escape, sorted(self._control_strings, key=len, reverse=True)))

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._control_strings.values()) | frozenset(self._tokenizer.all_special_ids)

    def _controls(self, ids: Iterable[int]) -> list[int]:
        return [index for index in ids if index in self._control_ids]

    def _cut(self, pieces: Rendered) -> list[str]:
        """The prompt cut after the first character of every control string that is not wholly the template's."""
        text = "".join(part for part, _ in pieces)
        content, position = bytearray(len(text)), 0
        for part, is_content in pieces:
            content[position : position + len(part)] = bytes([is_content]) * len(part)
            position += len(part)
        cuts = [0]
        for match in re.finditer(f"(?=({self._control_pattern}))", text):  # a lookahead finds overlapping ones as well
            start, end = match.span(1)
            if any(content[start:end]):
                cuts.append(start + 1)
        return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _break(marker: re.Match[str]) -> str:
    start = len(marker[0]) - len(marker[0].lstrip()) + 1
    return f"{marker[0][:start]}\N{ZERO WIDTH SPACE}{marker[0][start:]}"
