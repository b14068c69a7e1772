"""PAD's table: what reward models make of each method's replies, how varied those are, and how often a judge prefers
them to the base model's.

Source: Chen et al., "PAD", section 4 and Appendix B.2; the diversity score is Khanov et al.'s (ARGS).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefmw.errors import UsageError
from prefmw.evaluation.content import words_of
from prefmw.evaluation.held_out import Item, held_out_items, profile_of
from prefmw.evaluation.judges import Case, Judge
from prefmw.evaluation.reward_models import Reward, Said
from prefmw.evaluation.runs import Run
from prefmw.evaluation.statistics import cluster_interval
from prefmw.evaluation.steer import Condition, replies_to
from prefmw.preferences import Dimensions, Message, Profile, principle_text
from prefmw.steering import Backend
from prefmw.training.rows import read_rows
from prefmw.training.styles import Split

PREDEFINED = (
    "harmless",
    "helpful",
    "humor",
    "harmless and helpful",
    "harmless and humor",
    "helpful and humor",
    "harmless and helpful and humor",
)
"""The paper's preferences, asked for one after another where data names none."""


@dataclass(frozen=True)
class Asked:
    """A question under a preference: in words (``principle``), or a held-out item's."""

    question: str
    profile: Profile
    principle: str
    item: Item | None = None


def held_out(split: Split, n: int, seed: int, dimensions: Dimensions) -> list[Asked]:
    """Held-out questions of held-out people, ``n`` an axis; first turns alone."""
    return [
        Asked(item.question, item.profile, principle_text(item.profile, dimensions), item)
        for item in held_out_items(split, n, seed=seed)
    ]


def read_prompts(path: Path, preferences: Sequence[str]) -> list[Asked]:
    """The prompts in a file of JSON lines, a JSON list or Parquet, each under its own ``preference`` or under every one
    of ``preferences``.

    Raises:
        UsageError: the file cannot be read or is empty, or a row has no ``prompt``.
    """
    rows = list(read_rows(path, Counter()))
    if not rows:
        raise UsageError(
            f"'{path}' holds no prompt; expected rows with the column prompt, and preference if they differ"
        )
    found = []
    for number, row in enumerate(rows, start=1):
        prompt, own = row.get("prompt"), row.get("preference")
        if not isinstance(prompt, str) or not prompt.strip():
            names = ", ".join(str(name)[:40] for name in row) or "none"
            raise UsageError(f"'{path}', row {number}: the column prompt is missing or empty; found {names}")
        for preference in [own] if isinstance(own, str) and own.strip() else preferences:
            found.append(Asked(prompt, profile_of({}), preference))
    return found


def diversity(text: str) -> float:
    """The product over n = 2, 3, 4 of unique n-grams over all n-grams; 1 where nothing is said twice. Lengths that have
    no n-gram count as 1.
    """
    words, product = words_of(text), 1.0
    for n in (2, 3, 4):
        grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
        product *= len(set(grams)) / len(grams) if grams else 1.0
    return product


def reward_rows(
    asked: Sequence[Asked],
    conditions: Iterable[Condition],
    rewards: Mapping[str, Reward],
    judge: Judge | None,
    backend: Backend,
    dimensions: Dimensions,
    run: Run,
    *,
    seed: int = 0,
    progress: Callable[[Condition, int], None] = lambda condition, count: None,
) -> list[dict[str, Any]]:
    """Per condition one row a reward and one over ``all`` with diversity, win rate and cost.

    ``ci95`` and ``win_ci95`` resample preferences; ``over_prompt`` is the paired difference to prompting; ``win_rate``
    is over the replies of ``none``, the base, which has to come first to be compared with.
    """
    conversations = [[Message("user", one.question)] for one in asked]
    profiles, principles = [one.profile for one in asked], [one.principle for one in asked]
    clusters = [one.item.preference if one.item else f"{one.principle}\n{one.question}" for one in asked]
    rows: list[dict[str, Any]] = []
    texts: dict[str, list[str]] = {}
    prompted: dict[str, list[float]] = {}
    plain_cost: float | None = None
    replies_to(conversations[:4], profiles[:4], Condition("none"), backend, dimensions, seed, lambda count: None)
    for condition in conditions:

        def measure(condition: Condition = condition) -> dict[str, Any]:
            said, seconds, tokens = replies_to(
                conversations,
                profiles,
                condition,
                backend,
                dimensions,
                seed,
                partial(progress, condition),
                principles=principles,
            )
            replies = [Said(one.question, text, one.item) for one, text in zip(asked, said, strict=True)]
            scores = {name: reward(replies) for name, reward in rewards.items()}
            return {"texts": said, "seconds": seconds / max(1, tokens), "scores": scores}

        kept = run.unit(repr(condition), measure)
        progress(condition, len(asked))
        texts[condition.name] = kept["texts"]
        plain_cost = kept["seconds"] if condition.name == "none" else plain_cost
        about = {"method": condition.name, "strength": condition.strength, "temperature": condition.temperature}
        about |= {"top_k": condition.top_k, "n": len(asked)}
        for name, scores in kept["scores"].items():
            row = {**about, "reward": name, **_mean("mean", scores, clusters)}
            if condition.name == "prompt":
                prompted[name] = scores
            elif name in prompted:
                ahead = [ours - theirs for ours, theirs in zip(scores, prompted[name], strict=True)]
                row["over_prompt"] = _mean("mean", ahead, clusters)
            rows.append(row)
        whole = {**about, "reward": "all", **_mean("diversity", list(map(diversity, kept["texts"])), clusters)}
        whole["cost_ratio"] = round(kept["seconds"] / plain_cost, 3) if plain_cost else None
        if judge is not None and "none" in texts and condition.name != "none":
            cases = [
                Case(one.question, one.principle, ours, base, one.item)
                for one, ours, base in zip(asked, kept["texts"], texts["none"], strict=True)
            ]
            won = run.unit(f"judged {condition!r}", partial(judge, cases))
            win = _mean("win_rate", won, clusters)
            whole |= {"win_rate": win["win_rate"], "win_ci95": win["ci95"]}
        rows.append(whole)
    return rows


def _mean(name: str, values: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    low, high = cluster_interval(values, clusters)
    return {name: round(sum(values) / len(values), 4), "ci95": [round(low, 4), round(high, 4)]}
