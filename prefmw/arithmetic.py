"""A DPA checkpoint put on a chat model's engine: a direction as the system prompt of one view, and the best of several
replies by the direction that was asked for.

Robust selection (*Robust Preference Alignment via Directional Neighborhood Consensus*): each of N replies is asked for
with a direction near v inside the trained cone, and the one with the greatest v . r is kept, v itself unprojected.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefmw.alignment import combine_plain
from prefmw.decoding import Engine, Request, Sampling, View
from prefmw.decoding.linears import Adapter
from prefmw.errors import UsageError
from prefmw.guidance import seeded
from prefmw.models import ChatModel
from prefmw.models.dpa import DPA
from prefmw.preferences import Direction, Message
from prefmw.preferences.directions import DPACard, draw_direction, with_system
from prefmw.rewards import Scorer


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """A DPA checkpoint on an engine.

    Attributes:
        card: what it is.
        revision: of its files.
        chat: the chat model whose replies it makes: the LoRA's backbone, or the checkpoint itself.
        engine: that decodes them.
        adapter: the LoRA's name in the engine; ``None`` for a whole model.
        load_scorer: loads the reward model that knows the attributes; ``None`` where none is known.
    """

    card: DPACard
    revision: str
    chat: ChatModel
    engine: Engine
    adapter: str | None
    load_scorer: Callable[[], Scorer] | None = None

    @property
    def label(self) -> str:
        """What a record names it by."""
        return f"{self.card.name}@{self.revision}"

    def scorer(self) -> Scorer:
        """The reward model.

        Raises:
            UsageError: none is known.
        """
        if self.load_scorer is None:
            raise UsageError(
                f"choosing among replies needs a reward model, and the card of '{self.card.name}' names none; name one "
                "with the setting reward (PREFMW_REWARD)"
            )
        return self.load_scorer()

    def request(
        self,
        messages: Sequence[Message],
        prompt: str,
        sampling: Sampling,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        opening: Sequence[tuple[str, bool]] = (),
    ) -> Request:
        """A reply under one of the checkpoint's system prompts."""
        context = self.chat.template.encode(with_system(messages, prompt), tools=tools, opening=opening)
        view = View(context, adapter=self.adapter)
        return Request((view,), combine_plain, sampling, (), self.chat.stop_ids)

    def around(
        self, messages: Sequence[Message], direction: Direction, sampling: Sampling, count: int, **options: Any
    ) -> list[Request]:
        """``count`` replies, each under a direction near the one asked for and with a seed of its own."""
        rng = random.Random(f"{sampling.seed}:directions")
        near = [draw_direction(self.card, rng, direction.asked) for _ in range(count)]
        asked = [self.request(messages, self.card.prompt(one), sampling, **options) for one in near]
        return [seeded(request, copy) for copy, request in enumerate(asked)]

    def best(
        self, messages: Sequence[Message], vector: Sequence[float], replies: Sequence[tuple[Sequence[int], bool]]
    ) -> int:
        """The place of the reply with the greatest v . r(x, y), of replies as token ids."""
        texts = [self.chat.tokenizer.decode(list(ids), skip_special_tokens=True) for ids, _ in replies]
        rewards = self.scorer().rewards([(messages, text) for text in texts], self.card.attributes)  # (R, K)
        values = [self.card.value(vector, row.tolist()) for row in rewards]
        return values.index(max(values))


def put_dpa_on(
    dpa: DPA, chat: ChatModel, engine: Engine, load_scorer: Callable[[], Scorer] | None = None
) -> Arithmetic:
    """Make a checkpoint that is a LoRA known to its chat model's engine.

    Raises:
        ModelError: the chat model is not the one that it was trained on.
    """
    dpa.check_backbone(chat)
    adapter = f"dpa {dpa.revision}" if dpa.lora else None
    if adapter is not None:
        engine.ensure_adapter(adapter, Adapter(dpa.lora))
    return Arithmetic(dpa.card, dpa.revision, chat, engine, adapter, load_scorer)
