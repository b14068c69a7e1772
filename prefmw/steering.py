"""A plan as what a loaded model's engine is asked: the views that a method reads a reply in, and their combiner.

A new alignment method is a combiner in ``prefmw.alignment`` and its views in :func:`build_request`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from prefmw.alignment import Combiner, combine_drift, combine_linear, combine_plain
from prefmw.arithmetic import Arithmetic
from prefmw.decoding import Engine, Generation, Request, View
from prefmw.errors import ContextLengthError, UsageError
from prefmw.guidance import BestOf, Guidance, seeded
from prefmw.models import ChatModel
from prefmw.plans import Plan
from prefmw.preferences import BEST_OF_K, PAD_TOP_K, Message

NEEDS_PERSRM = (
    "method 'pad' needs a PersRM, and none is known for this model: name one with --persrm (PREFMW_PERSRM), or make "
    "one with 'prefmw train persrm'"
)

NEEDS_DPA = (
    "method 'dpa' needs a chat model trained to read directions, and none is known for this one: name its checkpoint "
    "with --dpa (PREFMW_DPA), or make one with 'prefmw train dpa'; any model takes --method prompt"
)


class Backend(NamedTuple):
    """A loaded chat model, the engine that decodes with it, and what loads the PersRM that guides it and the DPA
    checkpoint on it, where there is one.
    """

    chat: ChatModel
    engine: Engine
    load_guidance: Callable[[], Guidance] | None = None
    load_arithmetic: Callable[[], Arithmetic] | None = None

    def guidance(self) -> Guidance:
        """The PersRM on this engine.

        Raises:
            UsageError: none is configured for this model.
        """
        if self.load_guidance is None:
            raise UsageError(NEEDS_PERSRM)
        return self.load_guidance()

    def arithmetic(self) -> Arithmetic:
        """The DPA checkpoint on its engine.

        Raises:
            UsageError: none is known for this model.
        """
        if self.load_arithmetic is None:
            raise UsageError(NEEDS_DPA)
        return self.load_arithmetic()


def begin(
    plan: Plan,
    request: Request,
    messages: Sequence[Message],
    engine: Engine,
    guidance: Guidance | None = None,
    scale: Tensor | None = None,
    arithmetic: Arithmetic | None = None,
) -> Generation:
    """Ask the engine for the reply: one, or where the best of several is wanted all of them."""
    if arithmetic is not None and plan.direction is not None and plan.robust is not None:
        wanted = plan.direction.asked
        options = {"tools": plan.tools, "opening": plan.opening}
        around = arithmetic.around(messages, plan.direction, request.sampling, plan.robust, **options)
        requests = [within_context(one, arithmetic.chat) for one in around]
        arithmetic.scorer()  # what is amiss with it is told before anything is asked
        return BestOf(_all_of(requests, engine), lambda replies: arithmetic.best(messages, wanted, replies))
    if guidance is None or plan.candidate != BEST_OF_K or not plan.strength:
        return engine.submit(request)
    copies = [seeded(request, copy) for copy in range(plan.sampling.top_k or PAD_TOP_K)]
    return guidance.best_of(messages, plan.principle, scale, engine, _all_of(copies, engine))


def _all_of(requests: Sequence[Request], engine: Engine) -> list[Generation]:
    generations: list[Generation] = []
    try:
        for request in requests:
            generations.append(engine.submit(request))
    except BaseException:  # what was begun has no reader
        for generation in generations:
            generation.cancel()
        raise
    return generations


def build_request(
    plan: Plan,
    messages: Sequence[Message],
    chat: ChatModel,
    guidance: Guidance | None = None,
    scale: Tensor | None = None,
    arithmetic: Arithmetic | None = None,
) -> Request:
    """The contexts that a method reads the reply in, and how their logits are combined. PAD needs the PersRM's
    ``guidance`` and the person's w_p, DPA its checkpoint.
    """

    def request(combiner: Combiner, *contexts: Sequence[Message], parameters: tuple[float, ...] = ()) -> Request:
        encode = partial(chat.template.encode, tools=plan.tools, opening=plan.opening)
        views = tuple(View(encode(context)) for context in contexts)
        return Request(views, combiner, plan.sampling, parameters, chat.stop_ids)

    if plan.method == "none" or not (plan.principle or plan.dials):
        return request(combine_plain, messages)
    if plan.method == "dpa":
        if arithmetic is None:
            raise UsageError("a plan by DPA needs the checkpoint that reads its direction")
        return arithmetic.request(messages, plan.principle, plan.sampling, tools=plan.tools, opening=plan.opening)
    if plan.method == "pad":
        if guidance is None:
            raise UsageError("a plan by PAD needs the PersRM that it is guided by")
        beta = 0.0 if plan.candidate == BEST_OF_K else plan.strength or 0.0  # the best of the base's own replies
        return guidance.request(messages, plan.principle, scale, beta, plan.sampling, plan.opening)
    if plan.method == "drift":
        base = with_principle(messages, plan.principle, chat) if plan.principle else messages
        if not plan.dials or plan.strength == 0:
            return request(combine_plain, base)
        sentences = [" ".join(filter(None, [plan.principle, dial.principle])) for dial in plan.dials]
        poles = [with_principle(messages, sentence, chat) for sentence in sentences]
        sizes, midpoints = [abs(dial.weight) for dial in plan.dials], [dial.midpoint for dial in plan.dials]
        return request(combine_drift, base, *poles, parameters=(plan.strength or 0.0, *sizes, *midpoints))
    steered = with_principle(messages, plan.principle, chat)
    if plan.method == "prompt" or plan.strength == 0:  # at ratio 0 the view without the principle has no say
        return request(combine_plain, steered)
    return request(combine_linear, messages, steered, parameters=(plan.strength or 0.0,))


def within_context(request: Request, chat: ChatModel) -> Request:
    """The request, its reply no longer than what its longest view leaves of the model's context.

    Raises:
        ContextLengthError: it leaves nothing.
    """
    prompt = max(len(view.context) for view in request.views)
    room = chat.capacity - prompt
    if room < 1:
        raise ContextLengthError(
            f"the conversation and its instructions take {prompt} tokens, beyond the {chat.capacity} that "
            f"'{chat.name}' can attend to; shorten the prompt or start a new conversation"
        )
    return replace(request, sampling=replace(request.sampling, max_tokens=min(request.sampling.max_tokens, room)))


def with_principle(messages: Sequence[Message], principle: str, chat: ChatModel) -> list[Message]:
    """The conversation with the principle behind its system prompt, or behind the one the template would write."""
    system = system_of(messages) or chat.template.default_system
    text = f"{system}\n\n{principle}" if system else principle
    return [Message("system", text), *(message for message in messages if message.role != "system")]


def system_of(messages: Sequence[Message]) -> str:
    """The system messages of a conversation as one prompt; empty where it has none."""
    return "\n\n".join(message.content for message in messages if message.role == "system" and message.content)
