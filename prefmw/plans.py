"""The plan of a turn: how a reply will be steered, in numbers and words that a person can read.

It follows from the person's profile, the call's options and the defaults, and needs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from prefmw.decoding import Sampling
from prefmw.models import ChatModel
from prefmw.preferences import (
    AUTO,
    GREEDY,
    PAD_TEMPERATURE,
    PAD_TOP_K,
    STOCHASTIC,
    Dial,
    Dimensions,
    Direction,
    DPACard,
    Profile,
    Weight,
    check_candidate,
    check_method,
    dials_of,
    direction_of,
    persona_sentence,
    principle_text,
)

MAX_ROBUST = 64
"""Replies that the best is kept of, at most."""


@dataclass(frozen=True)
class Plan:
    """How a reply is steered: everything but the conversation that decides its distribution.

    ``principle`` is what every steered view reads. ``dials`` are Drift's, a view each; ``left_out`` are the
    dimensions beyond their bound. ``candidate`` is how PAD picks, ``persrm`` the checkpoint that guides it.
    ``direction`` is DPA's, ``dpa`` the checkpoint that reads it, ``robust`` the replies that the best is kept of.
    ``tools`` are what the reply may call, ``opening`` what it is made to begin with.
    """

    method: str
    strength: float | None
    principle: str
    revision: int
    weights: Mapping[str, Weight]
    sampling: Sampling
    dials: tuple[Dial, ...] = ()
    left_out: tuple[str, ...] = ()
    candidate: str | None = None
    persrm: str | None = None
    direction: Direction | None = None
    dpa: str | None = None
    robust: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    opening: tuple[tuple[str, bool], ...] = ()

    def as_json(self, chat: ChatModel) -> dict[str, Any]:
        """The plan on one model, as it is recorded with a turn."""
        tools = {"tools": list(self.tools), "opening": "".join(text for text, _ in self.opening)} if self.tools else {}
        return tools | {
            "method": self.method,
            "strength": self.strength,
            "principle": self.principle,
            "dials": {dial.dimension: dial.as_json() for dial in self.dials},
            "revision": self.revision,
            "weights": {key: weight.value for key, weight in self.weights.items()},
            "candidates": {
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "top_k": self.sampling.top_k,
            },
            "candidate": self.candidate,
            "persrm": self.persrm,
            "direction": None if self.direction is None else self.direction.as_json(),
            "dpa": self.dpa,
            "robust": self.robust,
            "model": chat.name,
            "model_revision": chat.revision,
            "dtype": chat.dtype,
            "quantization": chat.spec.quantization,
            "template_options": chat.spec.template_options,
        }


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


def not_read(option: str, reader: str, method: str) -> str:
    """The notice of an option that another method reads than the turn's."""
    return f"{option} has no effect: it is {reader.upper()}'s, and the method is '{method}'"


def no_effect(plan: Plan, options: Options, user_id: str) -> list[str]:
    """What there is to tell: options that have no effect, weights that are left out, a reply that is plain."""
    told = []
    if plan.method == "drift":
        if not plan.dials:
            left = "the persona alone has a say" if plan.principle else "the reply is plain"
            told.append(f"{user_id} has no style weight, so {left}")
        if plan.left_out:
            told.append(
                f"of {user_id}'s weights the strongest {len(plan.dials)} act; left out: {', '.join(plan.left_out)}"
            )
    elif plan.method != "none" and not plan.principle:
        told.append(f"{user_id} has no persona and no style weight of 0.15 or more, so the reply is plain")
    if options.robust is not None and plan.robust is None:
        told.append(not_read("--robust", "dpa", plan.method))
    if options.candidate is not None and plan.candidate is None:
        told.append(not_read("--candidate", "pad", plan.method))
    if options.strength is not None and plan.strength is None:
        told.append(f"strength {options.strength:g} has no effect: method '{plan.method}' takes none")
    return told
