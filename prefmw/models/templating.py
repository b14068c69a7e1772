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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from prefmw.errors import ChatTemplateError, ModelError
from prefmw.models.marks import Marks, Rendered
from prefmw.preferences import Message, ToolCall

_MARKER = re.compile(r"[<\[{(|#]+[^\s<>]+[>\])}|:]+|[A-Z][A-Za-z]*:")
"""What a turn marker of plain text looks like: ``<|user|>``, ``[INST]``, ``<<SYS>>``, ``USER:``."""

ToolForm = Literal["hermes", "llama"]
"""How a model calls a tool: ``<tool_call>`` around {"name": ..., "arguments": ...}, as Hermes and Qwen do, or bare
{"name": ..., "parameters": ...}, as Llama 3 does.
"""


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

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        opening: Sequence[tuple[str, bool]] = (),
    ) -> list[int]:
        """The prompt's token ids: the conversation in the template, ending where the assistant's reply begins.

        System messages are joined in front, runs of one role merged, and the system prompt folded into the first user
        message where the template refuses one. ``tools`` are what the reply may call, as JSON schemas in OpenAI's form;
        ``opening`` is what the reply begins with.

        Raises:
            ChatTemplateError: no message to answer, or the template refuses the conversation or takes no tools.
        """
        if tools or any(message.calls or message.role == "tool" for message in messages):
            self.tool_form  # noqa: B018 (raises where there is none)
        pieces = [
            (self._without_markers(text) if content else text, content)
            for text, content in [*self._render(self._normalise(messages), tools=tools), *opening]
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

    @cached_property
    def tool_form(self) -> ToolForm:
        """How the model calls tools, by what the template prints for a call.

        Raises:
            ChatTemplateError: the template takes no tools, or prints calls in another way.
        """
        probe = "probe_of_tools"
        parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}, "required": ["a"]}
        tool = {"type": "function", "function": {"name": probe, "description": "a", "parameters": parameters}}
        asked = Message("user", "a")
        if not any(probe in text for text, _ in self._try(lambda: self._render([asked], tools=[tool])) or []):
            raise ChatTemplateError(
                f"the chat template of '{self._name}' takes no tools; choose a model that was trained to call them "
                "(Qwen2.5-Instruct, Llama-3.1-Instruct or Hermes, say)"
            )
        called = Message("assistant", "", (ToolCall(probe, arguments := '{"of_the_probe": 1}', "a"),))
        talk = [asked, called, Message("tool", "a", answers="a")]
        pieces = self._try(lambda: self._render(talk, tools=[tool])) or []
        before = "".join(text for text, _ in pieces).partition(arguments)[0]
        if re.search(rf'<tool_call>\s*{{"name":\s*"{probe}",\s*"arguments":\s*$', before):
            return "hermes"
        if re.search(rf'{{"name":\s*"{probe}",\s*"parameters":\s*$', before):
            return "llama"
        raise ChatTemplateError(
            f"the chat template of '{self._name}' writes calls of tools in a way that prefmw does not read; it reads "
            "Hermes' and Qwen's <tool_call> and Llama 3's JSON"
        )

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
        called = Message("assistant", "", (ToolCall("a", "{}"),))
        with_tool = self._try(lambda: self._render([talk[0], called, Message("tool", "an answer")])) or []
        for (before, _), (text, content), (after, _) in zip(with_tool, with_tool[1:], with_tool[2:], strict=False):
            if content and text == "an answer":  # what a tool's answer stands between, and nothing of the call's JSON
                words = self._outside_controls(before)[-1].split()[-1:] + self._outside_controls(after)[0].split()[:1]
                anywhere |= {word for word in words if _MARKER.fullmatch(word)}
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
            last = turns[-1] if turns else None
            if last and last.role == message.role and message.role != "tool" and not (last.calls or message.calls):
                turns[-1] = Message(message.role, f"{last.content}\n\n{content}")
            else:
                turns.append(replace(message, content=content))
        if not turns or turns[-1].role not in ("user", "tool"):
            raise ChatTemplateError("a conversation ends with a user's message, which the reply answers; add one")
        if system and self._takes_system:
            return [Message("system", system), *turns]
        if system:
            first = next(index for index, turn in enumerate(turns) if turn.role == "user")
            turns[first] = Message("user", f"{system}\n\n{turns[first].content}")
        return turns

    def _render(
        self, messages: Sequence[Message], *, reply: bool = True, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Rendered:
        """Render with a mark for each content, then put the contents back, keeping apart whose text is whose."""
        marks = Marks()
        calls = {call.id: (f"call{index:05}", call.name) for index, call in enumerate(_calls(messages))}
        marked = [self._marked(message, marks, calls) for message in messages]
        options = dict(self._options)
        if tools:
            options["tools"] = [self._marked_json(tool, marks) for tool in tools]
        try:
            text = self._tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=reply, **options)
        except Exception as error:  # templates raise what they like: jinja2 errors, TypeError, KeyError
            reason = " ".join(str(error).split())[:200]
            raise ChatTemplateError(
                f"the chat template of '{self._name}' refuses this conversation: {reason}"
            ) from error
        try:
            return marks.split(text)
        except ValueError as error:
            raise ChatTemplateError(f"the chat template of '{self._name}' {error}") from error

    @staticmethod
    def _marked(message: Message, marks: Marks, calls: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
        """A message as templates take it, with marks for what somebody wrote; ids become nine letters and digits."""
        found: dict[str, Any] = {"role": message.role, "content": marks.of(message.content, needed=not message.calls)}
        if message.calls:
            found["tool_calls"] = [
                {
                    "id": calls[call.id][0],
                    "type": "function",
                    "function": {
                        "name": marks.of(call.name, needed=False),
                        "arguments": marks.of_json(call.arguments),
                    },
                }
                for call in message.calls
            ]
        if message.role == "tool":
            number, name = calls.get(message.answers, ("call00000", ""))
            found |= {"tool_call_id": number, "name": marks.of(name, needed=False)}
        return found

    def _marked_json(self, value: Any, marks: Marks) -> Any:
        """A tool's schema, with marks for strings that look like control tokens or turn markers; templates look at the
        others, the types say.
        """
        if isinstance(value, Mapping):
            return {self._marked_json(key, marks): self._marked_json(item, marks) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked_json(item, marks) for item in value]
        if isinstance(value, str) and self._is_suspicious(value):
            return marks.of(value, needed=False)
        return value

    def _is_suspicious(self, text: str) -> bool:
        controls = self._control_strings and re.search(self._control_pattern, text)
        return bool(controls or (self._text_markers and self._text_markers.search(text)))

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


def _calls(messages: Iterable[Message]) -> Iterable[ToolCall]:
    return (call for message in messages for call in message.calls)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _break(marker: re.Match[str]) -> str:
    start = len(marker[0]) - len(marker[0].lstrip()) + 1
    return f"{marker[0][:start]}\N{ZERO WIDTH SPACE}{marker[0][start:]}"
