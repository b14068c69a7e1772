"""Directional Preference Alignment trained: prompts in, a chat model that obeys directions out.

Iteration 0 is a SteerLM-style model, conditioned on rewards and trained on one half of the prompts with their original
replies, which the reward model annotates (those of both halves where the best reply may be an original one). Iteration
1 samples from it, under diverse rewards, for the other half; every later one samples from the one before, under
directions, the halves taking turns. Of the replies to a prompt the one with the greatest v . r is learned, under v, and
every iteration starts from the same chat model (section 2.2, 3.1).

A run's folder holds ``run.json`` (what is run), ``annotated/``, for every iteration ``iteration-T/`` with its samples,
its checkpoints and the finished ``dpa/``, then ``dpa/``, that of the last one, ``metrics.json`` and ``front.png``. Kill
a run and start it again with the same arguments: it goes on.

Source: Wang et al., "Arithmetic Control of LLMs ...". What it leaves open and is decided here: iteration 1 keeps a best
reply for as many directions a prompt as later ones; its rewards are uniform between the 5% and 95% quantiles of the
annotated ones, helpfulness in the upper half of its; the replayed original replies stand under the plain prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prefmw.errors import UsageError
from prefmw.models import ChatModel, ModelSpec, load_chat_model
from prefmw.models.dpa import load_dpa, save_dpa
from prefmw.models.lora_files import Lora
from prefmw.models.persrm import BackboneCard
from prefmw.preferences import Message
from prefmw.preferences.directions import DPA_CARD, REWARD_TEMPLATE, DPACard, Vector, draw_direction, with_system
from prefmw.training.conditioned import Lesson, encode_lessons, fit_lessons
from prefmw.training.dpa_prompts import Prompt, read_prompts, reward_ranges, reward_targets
from prefmw.training.dpa_recipe import DPARecipe
from prefmw.training.drawing import Ask, LoadScorer, Policy, opened_policy
from prefmw.training.front import front_of, plain_point, plot_fronts
from prefmw.training.runs import bars, claim, device_of, fastest_dtype, keep_freed_memory, lora_of, processes
from prefmw.training.shards import Drawing, Reply, draw_shards, read_shards

_log = logging.getLogger(__name__)

FRONT_TEMPERATURE = 0.7
"""The paper's, in evaluation."""

Bar = Callable[[str], Callable[[int, int], None]]


def train_dpa(
    recipe: DPARecipe,
    out: Path,
    *,
    load_scorer: LoadScorer,
    data: Sequence[Path] = (),
    backbone_path: Path | None = None,
    sampler: str = "engine",
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Train a chat model to obey directions as ``recipe`` says, on its corpus or on the prompts and replies in
    ``data``, resuming what ``out`` holds of it.

    Args:
        load_scorer: loads the reward model.
        sampler: what draws the replies, the engine or vLLM.

    Returns:
        The last iteration's checkpoint, and the metrics.

    Raises:
        UsageError: too few prompts, a reward model that does not score an attribute, or ``out`` holds another run.
        ModelError: the backbone cannot be loaded, or the reward model does not fit it.
        TrainingError: the loss is not a number.
    """
    keep_freed_memory()
    state = processes()
    prompts, held_out = read_prompts(recipe, data)
    with state.main_process_first():
        claim(out, "run.json", _identity(recipe, prompts, held_out), "a run of another recipe or of other data")
    run = _Run(recipe, out, prompts, held_out, load_scorer, backbone_path, sampler, device_of(state), state)
    with bars(progress and state.is_main_process) as bar:
        targets = run.annotate(bar)
    logs = []
    for iteration in range(recipe.iterations + 1):
        with bars(progress and state.is_main_process) as bar:
            lessons = run.lessons(iteration, targets, bar)
        logs.append(run.fit(iteration, lessons, targets, progress and state.is_main_process))
        with bars(progress and state.is_main_process) as bar:
            run.front(iteration, bar)
    fronts = [json.loads((run.folder(t) / "front.json").read_text("utf-8")) for t in range(recipe.iterations + 1)]
    metrics = {
        "fronts": fronts,
        "plain": json.loads((out / "annotated" / "plain.json").read_text("utf-8")),
        "attributes": list(recipe.attributes),
        "prompts": {"all": len(prompts), "held_out": len(held_out)},
        "iterations": logs,
        "recipe": asdict(recipe),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    final = out / "dpa"
    if state.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(run.folder(recipe.iterations) / "dpa", final)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        plot_fronts(metrics, out / "front.png")
    state.wait_for_everyone()
    return final, metrics


@dataclass(frozen=True)
class _Run:
    """One run: what it trains, on what, where, and by which process of several."""

    recipe: DPARecipe
    out: Path
    prompts: list[Prompt]
    held_out: list[Prompt]
    load_scorer: LoadScorer
    backbone_path: Path | None
    sampler: str
    device: str
    state: Any

    def folder(self, iteration: int) -> Path:
        return self.out / f"iteration-{iteration}"

    def half(self, iteration: int) -> list[int]:
        """The prompts of an iteration: those of 0 and of the even ones, or the others."""
        return list(range(iteration % 2, len(self.prompts), 2))

    def annotate(self, bar: Bar) -> list[list[Vector]]:
        """The original replies scored, and the rewards of those of iteration 0's half, by prompt in its order.

        The other half's are scored as well where the best reply may be an original one.
        """
        folder, half = self.out / "annotated", self.half(0)
        numbers = range(len(self.prompts)) if self.recipe.draws.originals else half
        if not self._all_there(folder, numbers) or not (folder / "plain.json").is_file():
            with self._policy(None, temperature=FRONT_TEMPERATURE) as policy:

                def make(some: Sequence[int]) -> list[Drawing]:
                    return self._scored_originals(policy, some)

                self._draw(folder, numbers, make, bar("annotating"))
                if self.state.is_main_process:
                    point = plain_point(policy, [prompt.messages for prompt in self.held_out], self.recipe)
                    (folder / "plain.json").write_text(json.dumps(point) + "\n", encoding="utf-8")
        self.state.wait_for_everyone()
        if missing := set(numbers) - set(self.originals):
            raise UsageError(
                f"{folder} lacks the original replies to {len(missing)} prompts, as runs of an earlier version do; "
                "name another folder with --out"
            )
        return [[reply.rewards for reply in self.originals[number]] for number in half]

    @cached_property
    def originals(self) -> dict[int, tuple[Reply, ...]]:
        """The original replies with their rewards, by prompt, once :meth:`annotate` has written them."""
        return {drawing.prompt: drawing.replies for drawing in read_shards(self.out / "annotated")}

    def lessons(self, iteration: int, annotated: list[list[Vector]], bar: Bar) -> list[Lesson]:
        """What an iteration learns: for 0 the original replies under their rewards, later the best of what is drawn."""
        recipe, card = self.recipe, self.recipe.card()
        if iteration == 0:
            ours = self._reward_card()
            return [
                Lesson(tuple(with_system(self.prompts[number].messages, ours.reward_prompt(reply.rewards))), reply.text)
                for number in self.half(0)
                for reply in self.originals[number]
            ]
        folder, half = self.folder(iteration) / "samples", self.half(iteration)
        if not self._all_there(folder, half):
            with self._policy(self.folder(iteration - 1) / "dpa") as policy:
                make = self._under_directions(policy, iteration)
                if iteration == 1:
                    make = self._under_rewards(policy, annotated)
                self._draw(folder, half, make, bar(f"iteration {iteration}: sampling"))
        self.state.wait_for_everyone()
        found = []
        for drawing in read_shards(folder):
            if recipe.draws.originals:
                drawing = replace(drawing, replies=drawing.replies + self.originals[drawing.prompt])
            if drawing.direction is not None:
                wanted = [drawing.direction]
            else:
                rng = random.Random(f"{recipe.seed}:{iteration}:{drawing.prompt}:directions")
                wanted = [draw_direction(card, rng) for _ in range(recipe.draws.first_directions)]
            for direction in wanted:
                if (best := drawing.best(direction, card)) is not None:
                    messages = with_system(self.prompts[drawing.prompt].messages, card.prompt(direction))
                    found.append(Lesson(tuple(messages), best.text))
        if not found:
            raise UsageError("no reply that was drawn came to its end; raise --max-tokens")
        return [*found, *self._replayed(iteration, half, len(found))]

    def fit(
        self, iteration: int, lessons: list[Lesson], annotated: list[list[Vector]], progress: bool
    ) -> dict[str, Any]:
        """An iteration's checkpoint made, unless it is there; what is to tell of it."""
        folder, recipe = self.folder(iteration), self.recipe
        told = folder / "fit.json"
        if not (folder / "dpa" / DPA_CARD).is_file() or not told.is_file():
            chat = load_chat_model(self._spec())
            backbone = asdict(BackboneCard.of(chat))
            chat.module.requires_grad_(not recipe.fit.rank)
            columns, left_out = encode_lessons(lessons, chat, recipe.fit.max_tokens)
            if left_out:
                _log.warning("%d replies left out beyond %d tokens", left_out, recipe.fit.max_tokens)
            model, log = fit_lessons(
                chat,
                columns,
                folder / "checkpoints",
                recipe.fit,
                seed=recipe.seed + iteration,
                bf16=torch.cuda.is_available() or fastest_dtype() == torch.bfloat16,
                progress=progress,
            )
            if self.state.is_main_process:
                self._save(folder / "dpa", iteration, model, chat, backbone, annotated)
                about = {"iteration": iteration, "lessons": len(columns["input_ids"]), "left_out": left_out, "log": log}
                told.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        self.state.wait_for_everyone()
        found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
        return found

    def front(self, iteration: int, bar: Bar) -> None:
        """An iteration's mean rewards by direction on the held-out prompts, unless they are there."""
        file = self.folder(iteration) / "front.json"
        if self.state.is_main_process and not file.is_file():
            folder = self.folder(iteration) / "dpa"
            card = DPACard.from_json((folder / DPA_CARD).read_text(encoding="utf-8"))
            with self._policy(folder, temperature=FRONT_TEMPERATURE) as policy:
                points = front_of(
                    policy,
                    card,
                    [prompt.messages for prompt in self.held_out],
                    self.recipe,
                    bar(f"iteration {iteration}: front"),
                )
            file.write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
        self.state.wait_for_everyone()

    # Drawing.

    def _under_rewards(self, policy: Policy, annotated: list[list[Vector]]) -> Callable[[Sequence[int]], list[Drawing]]:
        """Iteration 1's replies: every one asked for with rewards of its own."""
        card, draws, ranges = self._reward_card(), self.recipe.draws, reward_ranges(annotated)

        def make(some: Sequence[int]) -> list[Drawing]:
            asked: list[tuple[int, Vector, str]] = []
            for number in some:
                rng = random.Random(f"{self.recipe.seed}:1:{number}:rewards")
                for _ in range(draws.first):
                    wanted = tuple(rng.uniform(low, high) for low, high in ranges)
                    asked.append((number, wanted, card.reward_prompt(wanted)))
            replies = self._replies(policy, [(number, wanted, prompt) for number, wanted, prompt in asked], 1)
            return [Drawing(number, None, tuple(replies[number, None])) for number in some]

        return make

    def _under_directions(self, policy: Policy, iteration: int) -> Callable[[Sequence[int]], list[Drawing]]:
        """A later iteration's replies: so many under each of a prompt's directions."""
        card, draws = self.recipe.card(), self.recipe.draws

        def make(some: Sequence[int]) -> list[Drawing]:
            found = []
            wanted: list[tuple[int, Vector]] = []
            for number in some:
                rng = random.Random(f"{self.recipe.seed}:{iteration}:{number}:directions")
                wanted += [(number, draw_direction(card, rng)) for _ in range(draws.directions)]
            asked = [
                (number, direction, card.prompt(direction))
                for number, direction in wanted
                for _ in range(draws.replies)
            ]
            replies = self._replies(policy, asked, iteration, by_direction=True)
            for number, direction in wanted:
                found.append(Drawing(number, direction, tuple(replies[number, direction])))
            return found

        return make

    def _replies(
        self, policy: Policy, asked: Sequence[tuple[int, Vector, str]], iteration: int, *, by_direction: bool = False
    ) -> dict[tuple[int, Vector | None], list[Reply]]:
        asks, copies = [], dict[int, int]()
        for number, _, prompt in asked:
            copy = copies[number] = copies.get(number, -1) + 1
            context = policy.chat.template.encode(with_system(self.prompts[number].messages, prompt))
            asks.append(Ask(context, _seed(self.recipe.seed, iteration, number, copy)))
        drawn = policy.draw(asks)
        said = [(self.prompts[number].messages, one.text) for (number, _, _), one in zip(asked, drawn, strict=True)]
        found: dict[tuple[int, Vector | None], list[Reply]] = {}
        for (number, wanted, _), one, row in zip(asked, drawn, self._rewards(policy, said), strict=True):
            key = (number, wanted if by_direction else None)
            found.setdefault(key, []).append(Reply(one.text, one.ended, wanted, row))
        return found

    def _scored_originals(self, policy: Policy, numbers: Sequence[int]) -> list[Drawing]:
        said = [(number, text) for number in numbers for text in self.prompts[number].replies]
        rewards = self._rewards(policy, [(self.prompts[number].messages, text) for number, text in said])
        found: dict[int, list[Reply]] = {number: [] for number in numbers}
        for (number, text), row in zip(said, rewards, strict=True):
            found[number].append(Reply(text, True, (), row))
        return [Drawing(number, None, tuple(replies)) for number, replies in found.items()]

    def _rewards(self, policy: Policy, said: Sequence[tuple[Sequence[Message], str]]) -> list[Vector]:
        rows = policy.scorer.rewards(said, self.recipe.attributes)
        return [tuple(float(value) for value in row) for row in rows]

    def _draw(
        self,
        folder: Path,
        numbers: Sequence[int],
        make: Callable[[Sequence[int]], list[Drawing]],
        progress: Callable[[int, int], None],
    ) -> None:
        draw_shards(
            folder,
            numbers,
            self.recipe.draws.shard,
            make,
            progress,
            process=self.state.process_index,
            processes=self.state.num_processes,
        )

    def _all_there(self, folder: Path, numbers: Sequence[int]) -> bool:
        return len(list(folder.glob("*.jsonl"))) == -(-len(numbers) // self.recipe.draws.shard)

    def _replayed(self, iteration: int, half: Sequence[int], count: int) -> list[Lesson]:
        """Original replies under the plain prompt, so many that they are the recipe's share of all."""
        rng = random.Random(f"{self.recipe.seed}:{iteration}:replay")
        said = [(number, text) for number in half for text in self.prompts[number].replies]
        wanted = round(self.recipe.replay / (1 - self.recipe.replay) * count)
        return [
            Lesson(self.prompts[number].messages, text) for number, text in rng.sample(said, min(wanted, len(said)))
        ]

    # Models.

    def _spec(self, folder: Path | None = None) -> ModelSpec:
        return ModelSpec(self.recipe.backbone, path=folder or self.backbone_path, device=self.device)

    def _reward_card(self, targets: Sequence[Vector] = ()) -> DPACard:
        return self.recipe.card(condition="rewards", template=REWARD_TEMPLATE, targets=tuple(targets))

    def _policy(self, folder: Path | None, *, temperature: float | None = None) -> Any:
        """The policy in a checkpoint's folder, or the backbone itself."""
        lora: Lora | None = None
        spec = self._spec()
        if folder is not None and self.recipe.fit.rank:
            lora = load_dpa(folder).lora
        elif folder is not None:
            spec = self._spec(folder)
        return opened_policy(
            self.sampler,
            spec,
            lora,
            self.load_scorer,
            temperature=self.recipe.draws.temperature if temperature is None else temperature,
            max_tokens=self.recipe.draws.max_tokens,
            scratch=self.out / "policy",
        )

    def _save(
        self,
        folder: Path,
        iteration: int,
        model: Any,
        chat: ChatModel,
        backbone: dict[str, Any],
        annotated: list[list[Vector]],
    ) -> None:
        recipe = self.recipe
        about = {"iteration": iteration, "iterations": recipe.iterations, "seed": recipe.seed}
        card = recipe.card(training=about, backbone=backbone)
        if iteration == 0:
            card = self._reward_card(reward_targets(annotated))
            card = DPACard(**{**vars(card), "training": about, "backbone": backbone})
        if recipe.fit.rank:
            save_dpa(folder, card, lora_of(model), torch.bfloat16)
            load_dpa(folder)  # what cannot be read back is no result
            return
        model.save_pretrained(folder)
        chat.tokenizer.save_pretrained(folder)
        (folder / DPA_CARD).write_text(card.to_json(), encoding="utf-8")


def _identity(recipe: DPARecipe, prompts: list[Prompt], held_out: list[Prompt]) -> dict[str, Any]:
    digest = hashlib.sha256(repr((prompts, held_out)).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    table: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return {**{key: value for key, value in table.items() if value is not None}, "data": digest}


def _seed(*parts: int) -> int:
    """A seed for one reply, the same wherever and in whatever company it is drawn."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
