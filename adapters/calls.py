"""One call as it was read from the store: user, plan, options, conversation, and the key that caches keep it under."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from prefmw.adapters.opening import Opened, without_password
from prefmw.adapters.tool_calls import ToolCallReader
from prefmw.personalizer import Personalizer
from prefmw.plans import Options, Prepared
from prefmw.preferences import Message
from prefmw.steering import build_request


class Call(str):
    """As text, a hash of all that the reply follows from but the conversation.

    It goes with the call's keywords, of which LangChain's caches make their keys; so the reply that is kept under a
    plan is made by that plan, whatever happens to the profile in between.
    """

    opened: Opened
    prepared: Prepared
    messages: list[Message]
    options: Options
    trimmed: bool
    """Whether the conversation has lost what would not fit."""

    @classmethod
    def of(
        cls, opened: Opened, prepared: Prepared, messages: list[Message], options: Options, *, trimmed: bool
    ) -> Call:
        """The call, the model loaded to know its revision."""
        settings, sampling = opened.settings, prepared.plan.sampling
        about = {
            "user": prepared.user_id,
            "database": without_password(settings.database_url),
            "plan": prepared.plan.as_json(opened.personalizer.load()),
            "persrm": guidance.label if (guidance := opened.personalizer.guidance(prepared.plan)) else None,
            "dpa": arithmetic.label if (arithmetic := opened.personalizer.arithmetic(prepared.plan)) else None,
            "notices": prepared.notices,  # they stand in the reply that is kept
            "max_tokens": sampling.max_tokens,
            "seed": settings.seed if options.seed is None else sampling.seed,  # not one that was drawn for this call
        }
        call = cls(hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest())
        call.opened, call.prepared, call.messages, call.options = opened, prepared, messages, options
        call.trimmed = trimmed
        return call

    def reader(self) -> ToolCallReader | None:
        """What reads calls of tools out of the reply; ``None`` where it may call none."""
        if not self.options.tools:
            return None
        form = self.opened.personalizer.load().template.tool_form
        return ToolCallReader(form, "".join(text for text, _ in self.options.opening))

    @property
    def keywords(self) -> dict[str, Any]:
        """What it adds to the keywords."""
        return {"user_id": self.prepared.user_id, "plan": self}


def trimmed(said: list[Message], prepared: Prepared, personalizer: Personalizer) -> tuple[list[Message], Prepared]:
    """The conversation without its oldest exchanges, as many as leave room for the reply, and a notice of that.

    Room is ``max_tokens``, or a quarter of the model's context if that is less. System messages and the last question
    stay, so what is then too long still is.
    """
    plan = prepared.plan
    guidance, arithmetic = personalizer.guidance(plan), personalizer.arithmetic(plan)
    chat = arithmetic.chat if arithmetic else personalizer.load()
    room = min(plan.sampling.max_tokens, chat.capacity // 4)
    system = [message for message in said if message.role == "system"]
    turns = [message for message in said if message.role != "system"]

    def fits(start: int) -> bool:
        request = build_request(plan, [*system, *turns[start:]], chat, guidance, None, arithmetic)
        return max(len(view.context) for view in request.views) + room <= chat.capacity

    if fits(0):
        return said, prepared
    starts = [index for index, message in enumerate(turns) if message.role == "user" and index > 0]
    low, high = 0, len(starts) - 1  # the first start that fits, or the last of all
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(starts[middle]) else (middle + 1, high)
    if not starts:
        return said, prepared
    notice = f"the oldest {starts[low]} messages are left out, to fit the model's context of {chat.capacity} tokens"
    return [*system, *turns[starts[low] :]], prepared._replace(notices=(*prepared.notices, notice))
