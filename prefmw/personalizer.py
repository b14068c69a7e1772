"""One turn: profile -> plan -> reply -> record. The command line, LangChain and servers all call this."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefmw.arithmetic import Arithmetic
from prefmw.decoding import Sampling
from prefmw.errors import ConflictError, MissingExtraError, StoreError, UnknownUserError, UsageError
from prefmw.guidance import Guidance
from prefmw.hearing import infer_persona, learn_from
from prefmw.models import ChatModel, Detokenizer
from prefmw.plans import (
    MAX_ROBUST,
    Defaults,
    Options,
    Plan,
    Prepared,
    candidate_rule,
    choose_method,
    make_plan,
    no_effect,
)
from prefmw.preferences import (
    AUTO,
    STOCHASTIC,
    STRENGTHS,
    Dimensions,
    Message,
    PreferenceStore,
    Profile,
    Turn,
    check_candidate,
    check_strength,
    check_text,
    principle_text,
)
from prefmw.preferences.directions import about_direction
from prefmw.preferences.inference import Inferer
from prefmw.reply import Reply, ReplyStream, Timing
from prefmw.steering import NEEDS_DPA, NEEDS_PERSRM, Backend, begin, build_request, system_of, within_context


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
            raise UsageError(NEEDS_PERSRM)
        if method == "pad" and options.tools:
            raise UsageError("the prompts of method 'pad' hold no tools; choose linear, drift or prompt for this call")
        if method == "dpa" and defaults.dpa is None:
            raise UsageError(NEEDS_DPA)
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
        told = no_effect(plan, options, user_id)
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
                system=system_of(messages),
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
