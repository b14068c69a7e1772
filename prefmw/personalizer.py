"""One turn: profile -> plan -> reply -> record. The command line, LangChain and servers all call this.

A plan says, in numbers and words a person can read, how a reply will be steered. A new alignment method is a combiner
in ``prefmw.alignment`` and its views in :func:`build_request`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefmw.alignment import Combiner, combine_drift, combine_linear, combine_plain
from prefmw.arithmetic import Arithmetic
from prefmw.decoding import Engine, Generation, Request, Sampling, View
from prefmw.errors import ConflictError, ContextLengthError, MissingExtraError, StoreError, UnknownUserError, UsageError
from prefmw.guidance import BestOf, Guidance, seeded
from prefmw.models import ChatModel, Detokenizer
from prefmw.preferences import (
    AUTO,
    BEST_OF_K,
    GREEDY,
    PAD_TEMPERATURE,
    PAD_TOP_K,
    STOCHASTIC,
    STRENGTHS,
    Dimensions,
    DPACard,
    Message,
    PreferenceStore,
    Profile,
    Source,
    Stated,
    Turn,
    check_candidate,
    check_method,
    check_strength,
    check_text,
    dials_of,
    direction_of,
    persona_sentence,
    principle_text,
)
from prefmw.preferences.directions import about_direction
from prefmw.preferences.inference import STRICT, Inference, Inferer
from prefmw.preferences.profile import MAX_PERSONA
from prefmw.reply import Plan, Reply, ReplyStream, Timing

_NEEDS_PERSRM = (
    "method 'pad' needs a PersRM, and none is known for this model: name one with --persrm (PREFMW_PERSRM), or make "
    "one with 'prefmw train persrm'"
)


_NEEDS_DPA = (
    "method 'dpa' needs a chat model trained to read directions, and none is known for this one: name its checkpoint "
    "with --dpa (PREFMW_DPA), or make one with 'prefmw train dpa'; any model takes --method prompt"
)


MAX_ROBUST = 64
"""Replies that the best is kept of, at most."""


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
            raise UsageError(_NEEDS_PERSRM)
        return self.load_guidance()

    def arithmetic(self) -> Arithmetic:
        """The DPA checkpoint on its engine.

        Raises:
            UsageError: none is known for this model.
        """
        if self.load_arithmetic is None:
            raise UsageError(_NEEDS_DPA)
        return self.load_arithmetic()


@dataclass(frozen=True)
class Options:
    """What one call asks for; ``None`` leaves it to the user's profile and then to the defaults."""

    method: str | None = None
    strength: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    candidate: str | None = None
    robust: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the reply may call, as JSON schemas in OpenAI's form; its chat template has to take them."""
    opening: tuple[tuple[str, bool], ...] = ()
    """What the reply is made to begin with, not part of its text: (text, whether it is somebody's, not the model's)."""


@dataclass(frozen=True)
class Defaults:
    """What applies where neither the call nor the user says otherwise."""

    method: str = AUTO
    strength: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int | None = None
    max_tokens: int = 512
    seed: int | None = None
    max_dials: int = 7
    candidate: str | None = None
    has_persrm: bool = False
    dpa: Callable[[], DPACard] | None = None
    robust: int | None = None


class Prepared(NamedTuple):
    """A turn before a model is needed: whose it is (``None``: nobody's), how it is steered, what there is to tell."""

    user_id: str | None
    plan: Plan
    notices: tuple[str, ...]


def choose_method(
    profile: Profile, dimensions: Dimensions, asked: str | None, default: str, *, has_persrm: bool = False
) -> str:
    """The method of a turn: the call's, else the user's, else the default's, else by the profile.

    By the profile means ``none`` where there is no principle to follow, else ``pad`` where there is a PersRM, else
    ``linear``.

    Raises:
        UsageError: the one asked for does not exist.
    """
    for method in (asked, profile.method, default):
        if method is not None and check_method(method) != AUTO:
            return method
    if not principle_text(profile, dimensions):
        return "none"
    return "pad" if has_persrm else "linear"


def make_plan(
    profile: Profile,
    dimensions: Dimensions,
    method: str,
    strength: float | None,
    sampling: Sampling,
    *,
    max_dials: int = Defaults.max_dials,
    candidate: str = STOCHASTIC,
    dpa: DPACard | None = None,
    robust: int | None = None,
) -> Plan:
    """How ``method`` steers a reply to this person; of more than ``max_dials`` weights Drift takes the strongest, and
    ``candidate`` is how PAD picks; ``dpa`` is the card that DPA's direction is read by.

    Raises:
        UsageError: a direction of zeros.
    """
    if method == "dpa" and dpa is not None:
        direction = direction_of(profile, dpa)
        return Plan(
            method,
            None,
            direction.prompt,
            profile.revision,
            profile.weights,
            sampling,
            direction=direction,
            robust=robust,
        )
    dials = dials_of(profile, dimensions) if method == "drift" else []
    return Plan(
        method=method,
        strength=strength,
        principle=persona_sentence(profile) if method == "drift" else principle_text(profile, dimensions),
        revision=profile.revision,
        weights=profile.weights,
        sampling=sampling,
        dials=tuple(dials[:max_dials]),
        left_out=tuple(dial.dimension for dial in dials[max_dials:]),
        candidate=candidate if method == "pad" else None,
    )


def candidate_rule(sampling: Sampling, candidate: str | None, top_p: float | None) -> tuple[Sampling, str]:
    """PAD's way of drawing: the base's ``top_k`` likeliest tokens, ten by default, within a nucleus only where a call
    names one, and greedy, stochastic (at temperature 0.7 where none is set) or the best of ``top_k`` whole replies.

    Without a ``candidate`` the temperature decides between the first two.

    Raises:
        UsageError: no such way.
    """
    check_candidate(candidate)
    candidate = candidate or (STOCHASTIC if sampling.temperature else GREEDY)
    temperature = 0.0 if candidate == GREEDY else sampling.temperature or PAD_TEMPERATURE
    return replace(
        sampling,
        temperature=temperature,
        top_p=top_p or 1.0,
        top_k=PAD_TOP_K if sampling.top_k is None else sampling.top_k,
    ), candidate


class Personalizer:
    """Answers users on one chat model, each as their stored preferences say.

    Args:
        store: where profiles come from and turns go to.
        backend: loads the chat model when it is first needed, and returns the same one afterwards.
        dimensions: the registry that weights are read with.
        defaults: what applies where neither call nor user says otherwise.
        inferer: loads what reads preferences out of words, when it is first needed.
        infers: infer weights from a persona that none were inferred from yet.
        learns: take a preference that a user states in a message as theirs.
    """

    def __init__(
        self,
        store: PreferenceStore,
        backend: Callable[[], Backend],
        dimensions: Dimensions,
        defaults: Defaults,
        *,
        inferer: Callable[[], Inferer] | None = None,
        infers: bool = False,
        learns: bool = False,
    ) -> None:
        self._store = store
        self._backend = backend
        self._dimensions = dimensions
        self._defaults = defaults
        self._inferer = inferer
        self._infers = infers
        self._learns = learns
        self._loaded = False

    def load(self) -> ChatModel:
        """Load the chat model now rather than at the first reply."""
        return self._backend().chat

    def plan(self, profile: Profile, options: Options) -> Plan:
        """How a reply to this person will be steered. Needs no model.

        Raises:
            UsageError: an option out of range, an unknown method, a strength that the method does not take, PAD
            without a PersRM, or DPA without a checkpoint or with a direction of zeros.
        """
        defaults = self._defaults
        method = choose_method(
            profile,
            self._dimensions,
            options.method,
            defaults.method,
            has_persrm=defaults.has_persrm and not options.tools,
        )
        strength = options.strength
        if strength is None:
            strength = profile.strengths.get(method, self._defaults.strength.get(method))
        elif STRENGTHS[method] is None and options.method in (None, AUTO):
            strength = None  # asked for whatever method applies, and this one takes none: stream() says so
        strength = check_strength(method, strength)
        if method == "pad" and not defaults.has_persrm:
            raise UsageError(_NEEDS_PERSRM)
        if method == "pad" and options.tools:
            raise UsageError("the prompts of method 'pad' hold no tools; choose linear, drift or prompt for this call")
        if method == "dpa" and defaults.dpa is None:
            raise UsageError(_NEEDS_DPA)
        robust = defaults.robust if options.robust is None else options.robust
        if robust is not None and (not isinstance(robust, int) or not 1 <= robust <= MAX_ROBUST):
            raise UsageError(f"robust is a whole number from 1 to {MAX_ROBUST}, got {str(robust)[:20]}")
        sampling, candidate = self.sampling(options), check_candidate(options.candidate or defaults.candidate)
        if method == "pad":
            sampling, candidate = candidate_rule(sampling, candidate, options.top_p)
        plan = make_plan(
            profile,
            self._dimensions,
            method,
            strength,
            sampling,
            max_dials=defaults.max_dials,
            candidate=candidate or STOCHASTIC,
            dpa=defaults.dpa() if method == "dpa" and defaults.dpa is not None else None,
            robust=robust,
        )
        return replace(plan, tools=options.tools, opening=options.opening)

    def stream(
        self,
        user_id: str,
        messages: Sequence[Message],
        options: Options | None = None,
        *,
        conversation_id: str | None = None,
        replaces: int | None = None,
        log: bool = True,
    ) -> ReplyStream:
        """Begin a reply to ``messages``, the whole conversation with a user's message, or a tool's answer, last.

        Everything that can be refused is refused here, before the first token. ``conversation_id`` names the stored
        conversation that the turn continues; without it a recorded turn begins a new one. ``replaces`` names the
        conversation's turn that this one stands in for.

        Raises:
            UsageError: an unknown user, an option out of range, a prompt beyond the model's context, and so on.
            StoreError, ModelError, EngineError: the database, the model or the engine failed.
        """
        return self.begin(
            self.prepare(user_id, messages, options),
            messages,
            options,
            conversation_id=conversation_id,
            replaces=replaces,
            log=log,
        )

    def prepare(self, user_id: str | None, messages: Sequence[Message], options: Options | None = None) -> Prepared:
        """The first half of :meth:`stream`, which needs no model: read the profile and make the plan.

        For nobody (``None``) it is the plan of a plain reply, whatever ``options`` ask for.

        Raises:
            UsageError: an unknown user, an option out of range, nothing to answer.
            StoreError: the database failed.
        """
        options = options or Options()
        for message in messages:
            for text in (message.content, *(part for call in message.calls for part in (call.name, call.arguments))):
                check_text(text, "a message")
        last = messages[-1] if messages else Message("user", "")
        if last.role != "tool" and (last.role != "user" or not last.content.strip()):
            raise UsageError(
                "there is nothing to answer: the conversation ends with a user's message that is not empty"
            )
        if user_id is None:
            plain = replace(options, method="none", strength=None)
            return Prepared(None, self.plan(Profile(user_id="", persona="", revision=0), plain), ())
        try:
            profile = self._store.profile(user_id)
        except UnknownUserError:  # erased, perhaps by another process
            self.forget(user_id)
            raise
        profile, heard = self.reread(profile, last.content if last.role == "user" else None)
        plan = self.plan(profile, options)
        told = _notices(plan, options, user_id)
        if plan.direction is not None and self._defaults.dpa is not None:
            told += about_direction(plan.direction, profile, self._defaults.dpa())
        return Prepared(user_id, plan, (*heard, *told))

    def begin(
        self,
        prepared: Prepared,
        messages: Sequence[Message],
        options: Options | None = None,
        *,
        conversation_id: str | None = None,
        replaces: int | None = None,
        log: bool = True,
    ) -> ReplyStream:
        """The second half of :meth:`stream`, given the same messages and options. Nobody's turn is not recorded.

        Raises:
            UsageError, ModelError, EngineError: as there.
        """
        options, plan = options or Options(), prepared.plan
        backend, notices = self._backend(), list(prepared.notices)
        chat, engine, scale = backend.chat, backend.engine, None
        guidance: Guidance | None = None
        load_s, self._loaded = 0.0 if self._loaded else chat.load_s, True
        if prepared.user_id is not None and (guidance := self.guidance(plan)) is not None:
            plan = replace(plan, persrm=guidance.label)
            scale = self._scale(prepared.user_id, plan.principle, guidance, keep=log)
        if (arithmetic := self.arithmetic(plan)) is not None:
            chat, engine, plan = arithmetic.chat, arithmetic.engine, replace(plan, dpa=arithmetic.label)
        request = build_request(plan, messages, chat, guidance, scale, arithmetic)
        request = replace(within_context(request, chat), owner=prepared.user_id)
        prompt = max(len(view.context) for view in request.views)
        room = request.sampling.max_tokens
        if options.max_tokens is not None and room < options.max_tokens:
            notices.append(f"max-tokens is cut to {room}, what the model's context of {chat.capacity} leaves")
        draft = Reply(
            text="",
            user_id=prepared.user_id,
            model=chat.name,
            plan=plan,
            finish_reason="interrupted",
            input_tokens=prompt,
            output_tokens=0,
            timing=Timing(load_s, 0.0, 0.0, None),
            notices=tuple(notices),
            conversation_id=conversation_id,
        )

        def record(reply: Reply, token_ids: Sequence[int]) -> Reply:
            if not log or reply.user_id is None:
                return reply
            return self._record(reply.user_id, reply, token_ids, messages, chat, replaces)

        generation = begin(plan, request, messages, engine, guidance, scale, arithmetic)
        return ReplyStream(generation, Detokenizer(chat.tokenizer, options.stop), draft, record)

    def principle(self, profile: Profile) -> str:
        """The person's preferences in words, for a model that can only read them."""
        return principle_text(profile, self._dimensions)

    def guidance(self, plan: Plan) -> Guidance | None:
        """The PersRM that guides a plan's reply; ``None`` where none does. Loads models."""
        return self._backend().guidance() if plan.method == "pad" and plan.principle else None

    def arithmetic(self, plan: Plan) -> Arithmetic | None:
        """The DPA checkpoint that makes a plan's reply; ``None`` where none does. Loads models."""
        return self._backend().arithmetic() if plan.method == "dpa" else None

    def reply(
        self,
        user_id: str,
        messages: Sequence[Message],
        options: Options | None = None,
        *,
        conversation_id: str | None = None,
        log: bool = True,
    ) -> Reply:
        """The whole reply at once; see :meth:`stream`."""
        with self.stream(user_id, messages, options, conversation_id=conversation_id, log=log) as stream:
            for _ in stream:
                pass
        return stream.reply

    def reread(self, profile: Profile, message: str | None) -> tuple[Profile, list[str]]:
        """The profile with what its persona says, where that was not read yet, and with what the user's own ``message``
        (``None``: they said nothing) says, where they are listened to; and what there is to tell of it.

        What cannot be read for want of an embedder is told and left.
        """
        notices: list[str] = []
        if self._inferer is None:
            return profile, notices
        try:
            inferer = self._inferer()
            if self._infers and (profile.persona or profile.inferred_from):
                profile = infer_persona(self._store, profile, inferer)
            if self._learns and message is not None:
                profile, notices = learn_from(self._store, profile, message, inferer, self._dimensions)
        except MissingExtraError as error:
            notices.append(f"no preference was read out of words: {error}")
        except ConflictError:  # somebody else is at it; their profile stands
            profile = self._store.profile(profile.user_id)
        return profile, notices

    def forget(self, user_id: str) -> None:
        """Drop what is kept in memory of a user's conversations, as when they were erased."""
        if self._loaded:
            self._backend().engine.forget(user_id)

    def _scale(self, user_id: str, preference: str, guidance: Guidance, *, keep: bool) -> Tensor | None:
        """w_p of a preference text, where ``keep`` allows it kept in the store for the user's next turn."""
        if guidance.persrm.weight is None:
            return None
        content = hashlib.sha256(preference.encode()).hexdigest()
        kept = self._store.vector(user_id, "persrm", guidance.label, content)
        if kept is not None:
            return torch.tensor(kept)
        scale = guidance.scale(preference)
        assert scale is not None
        if keep:
            with suppress(StoreError):  # what is not kept is computed again
                self._store.put_vector(user_id, "persrm", guidance.label, content, scale.tolist())
        return scale

    def sampling(self, options: Options) -> Sampling:
        """How tokens are drawn: as the call says, and else as the defaults do; a seed that nobody gave is drawn."""

        def either(name: str) -> Any:
            asked = getattr(options, name)
            return getattr(self._defaults, name) if asked is None else asked

        seed = either("seed")
        return Sampling(
            temperature=either("temperature"),
            top_p=either("top_p"),
            top_k=either("top_k"),
            max_tokens=either("max_tokens"),
            seed=secrets.randbelow(2**32) if seed is None else seed,
        )

    def _record(
        self,
        user_id: str,
        reply: Reply,
        token_ids: Sequence[int],
        messages: Sequence[Message],
        chat: ChatModel,
        replaces: int | None,
    ) -> Reply:
        plan = reply.plan.as_json(chat)
        said = [message for message in messages if message.role != "system"]
        prompt = said.pop().content if said[-1].role == "user" else ""  # a tool's answer is part of what came before
        recorded = self._store.record(
            Turn(
                user_id=user_id,
                conversation_id=reply.conversation_id,
                system=_system(messages),
                history=() if reply.conversation_id else tuple(said),
                prompt=prompt,
                text=reply.text,
                finish_reason=reply.finish_reason,
                plan=plan,
                plan_hash=hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest(),
                method=reply.plan.method,
                strength=reply.plan.strength,
                revision=reply.plan.revision,
                model=chat.name,
                model_revision=chat.revision,
                seed=reply.plan.sampling.seed,
                token_ids=tuple(token_ids),
                input_tokens=reply.input_tokens,
                replaces=replaces,
            )
        )
        return replace(reply, conversation_id=recorded.conversation_id, turn_id=recorded.turn_id)


def infer_persona(store: PreferenceStore, profile: Profile, inferer: Inferer) -> Profile:
    """The profile with its inferred layers read anew from its persona, unless they were read from that already.

    Raises:
        ConflictError: it changed meanwhile.
        MissingExtraError: there is no embedder.
    """
    if profile.inferred_from == inferer.key(profile.persona):
        return profile
    return store_inference(store, profile, inferer, inferer.infer(profile.persona))


def store_inference(store: PreferenceStore, profile: Profile, inferer: Inferer, found: Inference) -> Profile:
    """The profile with what its persona was ``found`` to state as its inferred layers.

    Raises:
        ConflictError: it changed meanwhile.
    """
    unread = {
        key: Stated(weight.value, weight.confidence, weight.evidence)
        for key, weight in profile.layer(Source.inferred).items()
        if key not in inferer.dimensions  # retired, say: what is stored on it is kept
    }
    return store.write_inferred(
        profile.user_id,
        {**unread, **{dimension: one.stated for dimension, one in found.weights.items()}},
        inferred_from=inferer.key(profile.persona),
        actor="prefmw",
        reason="inferred from the persona",
        expected_revision=profile.revision,
    )


def learn_from(
    store: PreferenceStore, profile: Profile, message: str, inferer: Inferer, dimensions: Dimensions
) -> tuple[Profile, list[str]]:
    """The profile with the preferences that a user's own message states plainly, learned, and a line for each.

    Raises:
        ConflictError: it changed meanwhile.
        MissingExtraError: there is no embedder.
    """
    if len(message) > MAX_PERSONA:  # a document is no wish
        return profile, []
    heard = inferer.infer(message, threshold=STRICT).weights
    heard = {key: one for key, one in heard.items() if _is_news(profile, key, one.value)}
    if not heard:
        return profile, []
    profile = store.write_weights(
        profile.user_id,
        {key: Stated(one.value, abs(one.value), {"quote": one.clause}) for key, one in heard.items()},
        source=Source.learned,
        actor="prefmw",
        reason="said in a conversation",
        expected_revision=profile.revision,
    )
    undo = f"undo: prefmw prefs revert {profile.user_id} {profile.revision - 1}"
    return profile, [
        f'heard {key} {one.value:+.2f}, {dimensions[key].pole(one.value).name}, in "{one.clause}" ({undo})'
        for key, one in heard.items()
    ]


def _is_news(profile: Profile, dimension: str, value: float) -> bool:
    """Whether a weight says other than what was learned before."""
    before = profile.layer(Source.learned).get(dimension)
    return before is None or before.value * value < 0 or abs(before.value - value) > 0.2


def _notices(plan: Plan, options: Options, user_id: str) -> list[str]:
    """What was asked for and has no effect."""
    notices = []
    if plan.method == "drift":
        if not plan.dials:
            left = "the persona alone has a say" if plan.principle else "the reply is plain"
            notices.append(f"{user_id} has no style weight, so {left}")
        if plan.left_out:
            notices.append(
                f"of {user_id}'s weights the strongest {len(plan.dials)} act; left out: {', '.join(plan.left_out)}"
            )
    elif plan.method != "none" and not plan.principle:
        notices.append(f"{user_id} has no persona and no style weight of 0.15 or more, so the reply is plain")
    if options.robust is not None and plan.robust is None:
        notices.append(f"--robust has no effect: it is DPA's, and the method is '{plan.method}'")
    if options.candidate is not None and plan.candidate is None:
        notices.append(f"--candidate has no effect: it is PAD's, and the method is '{plan.method}'")
    if options.strength is not None and plan.strength is None:
        notices.append(f"strength {options.strength:g} has no effect: method '{plan.method}' takes none")
    return notices


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
        sizes, gains = [abs(dial.weight) for dial in plan.dials], [dial.gain for dial in plan.dials]
        return request(combine_drift, base, *poles, parameters=(plan.strength or 0.0, *sizes, *gains))
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
    system = _system(messages) or chat.template.default_system
    text = f"{system}\n\n{principle}" if system else principle
    return [Message("system", text), *(message for message in messages if message.role != "system")]


def _system(messages: Sequence[Message]) -> str:
    return "\n\n".join(message.content for message in messages if message.role == "system" and message.content)
