"""What a DPA training asks, of data or of the embedded corpus, and the rewards that its iteration 0 is asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prefmw.errors import UsageError
from prefmw.preferences import Message
from prefmw.preferences.directions import Vector
from prefmw.training.composed_scores import composed_scores
from prefmw.training.dpa_recipe import DPARecipe
from prefmw.training.scored import read_scored

TARGETS = 5
"""Rewards that a SteerLM-style model's front is drawn of, as in the paper."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, and the original replies to it."""

    messages: tuple[Message, ...]
    replies: tuple[str, ...]


def read_prompts(recipe: DPARecipe, data: Sequence[Path]) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, shuffled, and those held out for the front: each once, with its original replies."""
    if recipe.corpus is not None:
        count, answers = recipe.corpus.prompts, recipe.corpus.answers
        rows = list(composed_scores("train", count * answers, seed=recipe.seed, answers=answers, spoilt=0.1))
        held = composed_scores("dev", recipe.front_prompts, seed=recipe.seed)
        held_out = [Prompt(row.messages, (row.response,)) for row in held]
    else:
        rows, _ = read_scored(data, scores=False)
        held_out = []
    found: dict[tuple[Message, ...], list[str]] = {}
    for row in rows:
        found.setdefault(row.messages, []).append(row.response)
    prompts = [Prompt(messages, tuple(dict.fromkeys(replies))) for messages, replies in found.items()]
    random.Random(recipe.seed).shuffle(prompts)
    if not held_out:
        share = min(recipe.front_prompts, len(prompts) // 10)
        held_out, prompts = prompts[:share], prompts[share:]
    prompts = prompts[: recipe.prompts]
    if len(prompts) < 2 or not held_out:
        raise UsageError(
            f"{len(prompts)} different prompts are too few: two halves take turns and some are held out; give ten at "
            "least"
        )
    return prompts, held_out


def reward_ranges(annotated: list[list[Vector]]) -> list[tuple[float, float]]:
    """For each attribute the 5% and the 95% quantile of the annotated rewards; of the first one the upper half."""
    rows = torch.tensor([row for rows in annotated for row in rows])
    low, middle, high = (torch.quantile(rows, share, dim=0).tolist() for share in (0.05, 0.5, 0.95))
    return [(middle[0], high[0]), *zip(low[1:], high[1:], strict=True)]


def reward_targets(annotated: list[list[Vector]]) -> list[Vector]:
    """Rewards that go together: five values of each further attribute, between its 5% and 95% quantiles, with the best
    of the first attribute among the annotated replies near them: its 95% quantile among the nearest fifth.
    """
    rows = torch.tensor([row for rows in annotated for row in rows])
    found = []
    for step in range(TARGETS):
        further = torch.quantile(rows[:, 1:], 0.05 + 0.9 * step / (TARGETS - 1), dim=0)  # (K - 1,)
        near = (rows[:, 1:] - further).norm(dim=1).argsort()[: max(1, len(rows) // 5)]
        best = torch.quantile(rows[near, 0], 0.95)
        found.append((float(best), *further.tolist()))
    return found
