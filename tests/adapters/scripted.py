"""A chat model that follows a script, behind the engine's own seam: token ids in, token ids out.

Its tokenizer and chat template are a real one's, so prompts are rendered and replies read as anybody's are; what it
answers is decided by a function of the prompt's text rather than by weights.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefmw import bootstrap
from prefmw.bootstrap import load_backend
from prefmw.decoding import Generation, Request
from prefmw.settings import load_settings
from prefmw.steering import Backend

Script = Callable[[str], str]
"""From the prompt's text to the reply's."""


class ScriptedEngine:
    """Answers every request by a script, from a thread, as an engine does."""

    def __init__(self, tokenizer: Any, script: Script) -> None:
        self._tokenizer = tokenizer
        self.script = script
        self.prompts: list[list[str]] = []
        """For every request the text of each of its views."""

    def submit(self, request: Request) -> Generation:
        texts = [self._tokenizer.decode(list(view.context), skip_special_tokens=False) for view in request.views]
        self.prompts.append(texts)
        reply = self.script(texts[-1])
        ids = self._tokenizer(reply, add_special_tokens=False)["input_ids"][: request.sampling.max_tokens]
        generation = Generation()
        generation._start()
        cut = len(ids) == request.sampling.max_tokens
        threading.Thread(target=self._answer, args=(generation, ids, cut), daemon=True).start()
        return generation

    def forget(self, owner: str | None = None) -> None:
        pass

    def close(self) -> None:
        pass

    @staticmethod
    def _answer(generation: Generation, ids: list[int], cut: bool) -> None:
        for token in ids:
            if generation.cancelled:
                generation._finish("cancelled")
                return
            generation._drew()
            generation._emit(token)
        generation._finish("length" if cut else "stop")


def scripted(folder: Path, script: Script) -> ScriptedEngine:
    """Put a scripted engine in the place of a saved model's, for as long as engines are not closed."""
    settings = load_settings({"model": str(folder)})
    backend = load_backend(settings)
    (key,) = [key for key, found in bootstrap._backends.items() if found is backend]
    if not isinstance(backend.engine, ScriptedEngine):
        backend.engine.close()
    engine = ScriptedEngine(backend.chat.tokenizer, script)
    bootstrap._backends[key] = Backend(backend.chat, engine)
    return engine


def dutiful(prompt: str) -> str:
    """A model that calls the tool the question is about, fills in its arguments from the question, and answers in words
    once a tool has answered. It knows Hermes' form.
    """
    talk, _, begun = prompt.rpartition("<|im_start|>assistant\n")
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", talk, re.DOTALL)
    role, said = turns[-1]
    if "<tool_response>" in said:
        return f"It says: {said.split('<tool_response>')[1].split('</tool_response>')[0].strip()}"
    system = turns[0][1] if turns[0][0] == "system" else ""
    tools = [json.loads(line) for line in system.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()]
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    named = re.search(r'"name": "([^"]+)"', begun)
    if not functions:
        return "Hello to you."
    mentioned = [name for name in functions if name in said or name.split("_")[-1] in said.lower()]
    name = named[1] if named else (mentioned or list(functions))[0]
    if not (begun or mentioned):
        return "Hello to you."
    call = {"name": name, "arguments": _arguments(functions[name].get("parameters", {}), said)}
    whole = f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
    assert whole.startswith(begun), (begun, whole)
    return whole.removeprefix(begun)


def _arguments(schema: dict, said: str) -> dict:
    numbers = iter(re.findall(r"-?\d+", said))
    quoted = re.findall(r"'([^']+)'", said)
    found: dict[str, Any] = {}
    for name, about in schema.get("properties", {}).items():
        if about.get("type") == "integer":
            found[name] = int(next(numbers, "0"))
        else:
            found[name] = quoted[0] if quoted else f"{name} of {said[:20]}"
    return found
