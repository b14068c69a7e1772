"""DPA's training on a toy: what every iteration learns, samples on disk, killed runs, vLLM's seam, whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from prefmw.decoding import Engine
from prefmw.errors import MissingExtraError, UsageError
from prefmw.models import ModelSpec, load_chat_model
from prefmw.models.dpa import load_dpa
from prefmw.preferences import DPACard
from prefmw.preferences.directions import angles_of, read_card
from prefmw.rewards import Scorer
from prefmw.training.dpa import train_dpa
from prefmw.training.dpa_prompts import reward_ranges, reward_targets
from prefmw.training.dpa_recipe import DPARecipe, Draws, Fit, load_dpa_recipe
from prefmw.training.drawing import Ask, opened_policy
from prefmw.training.shards import Drawing, Reply, read_shards

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

PROMPTS = 24


def scorer(chat, engine: Engine) -> Scorer:
    """Verbosity is the number of words, helpfulness of vowels: a reward model that needs no training."""
    from prefmw.models.reward import RewardCard

    def read(texts: list[list[int]]) -> torch.Tensor:
        said = [chat.tokenizer.decode(ids).rpartition("assistant\n")[2] for ids in texts]
        return torch.tensor(
            [
                [min(100.0, 5.0 * sum(text.count(v) for v in "aeiou")), min(100.0, 4.0 * len(text.split()))]
                for text in said
            ]
        )

    return Scorer(RewardCard("words", ("helpfulness", "verbosity")), "1", chat, read)


def data(folder: Path, count: int = PROMPTS) -> Path:
    path = folder / "prompts.jsonl"
    replies = ["Keep the room dark.", "Put the phone away an hour before bed, and keep the room dark and cool."]
    rows = [
        {"prompt": f"How do I fall asleep faster? {n}", "response": reply} for n in range(count) for reply in replies
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(toy: Path, **changes) -> DPARecipe:
    draws = Draws(first=4, directions=2, replies=3, max_tokens=40, shard=4)
    fit = Fit(
        rank=4, learning_rate=1e-2, epochs=6, warmup_steps=1, batch=8, per_device=4, packing=False, max_tokens=256
    )
    known = {"iterations": 2, "front_prompts": 2, "front_directions": 3, "draws": draws, "fit": fit}
    return DPARecipe("toy-dpa", str(toy), "words", **{**known, **changes})


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpa")
    path, metrics = train_dpa(recipe(toy), folder / "run", load_scorer=scorer, data=[data(folder)], progress=False)
    return folder, path, metrics


def test_the_run_leaves_a_checkpoint_metrics_and_the_fronts(finished, chat_model):
    folder, path, metrics = finished
    dpa = load_dpa(path)
    dpa.check_backbone(chat_model)
    assert (dpa.card.name, dpa.card.training["iteration"], dpa.card.reward) == ("toy-dpa", 2, "words")
    assert len(dpa.lora) == 14
    assert json.loads((folder / "run" / "metrics.json").read_text())["fronts"] == metrics["fronts"]
    assert [len(front) for front in metrics["fronts"]] == [5, 3, 3]
    assert (folder / "run" / "front.png").stat().st_size > 1000


def test_iteration_0_is_conditioned_on_rewards_and_later_ones_on_directions(finished):
    folder, _, _ = finished
    first, later = (read_card(folder / "run" / f"iteration-{t}" / "dpa") for t in (0, 1))
    assert (first.condition, len(first.targets), later.condition) == ("rewards", 5, "direction")


def test_halves_take_turns_and_every_reply_is_on_disk(finished):
    folder, _, _ = finished
    first, second = (list(read_shards(folder / "run" / f"iteration-{t}" / "samples")) for t in (1, 2))
    count = PROMPTS - 2  # two are held out
    assert [drawing.prompt for drawing in first] == list(range(1, count, 2))
    assert sorted({drawing.prompt for drawing in second}) == list(range(0, count, 2))
    assert all(len(drawing.replies) == 4 and drawing.direction is None for drawing in first)
    assert all(len(drawing.replies) == 3 for drawing in second)
    assert all(-45 <= angles_of(drawing.direction)[0] <= 1e-9 for drawing in second)
    texts = [reply.text for drawing in first for reply in drawing.replies]
    assert len(set(texts)) > len(texts) / 2


def test_original_replies_may_be_the_best(toy, tmp_path, monkeypatch):
    """All are scored once, and learned where they have the greatest v . r beside what is drawn."""
    from prefmw.training import dpa

    learned = []
    encode = dpa.encode_lessons
    monkeypatch.setattr(dpa, "encode_lessons", lambda lessons, *rest: learned.append(lessons) or encode(lessons, *rest))
    draws = Draws(first=2, directions=2, replies=1, max_tokens=40, shard=4, originals=True)
    fit = Fit(rank=2, learning_rate=1e-3, epochs=1, batch=8, per_device=8, packing=False, max_tokens=256)
    made = recipe(toy, iterations=2, replay=0.0, draws=draws, fit=fit)
    train_dpa(made, tmp_path / "run", load_scorer=scorer, data=[data(tmp_path, 12)], progress=False)
    originals = {drawing.prompt: drawing.replies for drawing in read_shards(tmp_path / "run" / "annotated")}
    assert sorted(originals) == list(range(11))  # one is held out
    assert len(learned[0]) == 2 * 6  # iteration 0 learns those of its half
    drawn = {t: list(read_shards(tmp_path / "run" / f"iteration-{t}" / "samples")) for t in (1, 2)}
    assert all(reply.asked for part in drawn.values() for drawing in part for reply in drawing.replies)
    for iteration in (1, 2):
        assert {lesson.reply for lesson in learned[iteration]} & {reply.text for reply in originals[0]}
    assert [lesson.reply for lesson in learned[2]] == [
        replace(drawing, replies=drawing.replies + originals[drawing.prompt]).best(drawing.direction, made.card()).text
        for drawing in drawn[2]
    ]


def test_scores_of_originals_that_an_earlier_version_left_are_refused(toy, tmp_path):
    draws = Draws(first=2, directions=2, replies=1, max_tokens=20, shard=4, originals=True)
    made = recipe(toy, iterations=1, draws=draws)
    folder = tmp_path / "run"
    there = [data(tmp_path, 12)]
    train_dpa(replace(made, fit=replace(made.fit, epochs=0.5)), folder, load_scorer=scorer, data=there, progress=False)
    first = folder / "annotated" / "00000.jsonl"
    rows = first.read_text().splitlines(keepends=True)
    first.write_text("".join(rows[::2]))  # of one half alone
    with pytest.raises(UsageError, match="lacks the original replies to 2 prompts"):
        train_dpa(
            replace(made, fit=replace(made.fit, epochs=0.5)), folder, load_scorer=scorer, data=there, progress=False
        )


def test_two_processes_share_the_work(toy, tmp_path):
    """Each draws its share of the lots, and they fit one model together; by ``torchrun``."""
    script = tmp_path / "share.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tests.training.test_dpa import Draws, Fit, data, recipe, scorer, train_dpa\n"
        "here, toy = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "def counting(chat, engine):\n"
        "    made = scorer(chat, engine)\n"
        "    def read(texts):\n"
        "        with open(here / ('rank-' + os.environ['RANK']), 'a') as file:\n"
        "            print(len(texts), file=file)\n"
        "        return scorer_read(texts)\n"
        "    scorer_read = made.read\n"
        "    return type(made)(made.card, made.revision, made.chat, read)\n"
        "fit = Fit(rank=2, learning_rate=1e-3, epochs=1, batch=8, per_device=4, packing=False, max_tokens=256)\n"
        "draws = Draws(first=2, directions=2, replies=1, max_tokens=20, shard=2)\n"
        "made = recipe(toy, iterations=1, draws=draws, fit=fit)\n"
        "train_dpa(made, here / 'run', load_scorer=counting, data=[here / 'prompts.jsonl'], progress=False)\n"
    )
    data(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path), str(toy)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scored = [sum(map(int, (tmp_path / f"rank-{rank}").read_text().split())) for rank in (0, 1)]
    half = (PROMPTS - 2) // 2
    drawn, shown = half * 2 + half * 2, (5 + 3 + 1) * 2  # annotated and drawn; the fronts, which the first one draws
    assert sum(scored) == drawn + shown
    assert scored[1] >= drawn // 3
    fits = [json.loads((tmp_path / "run" / f"iteration-{t}" / "fit.json").read_text()) for t in (0, 1)]
    for fit in fits:  # of eight lessons a step, four in either process
        assert max(row["step"] for row in fit["log"]) == -(-fit["lessons"] // 8)
    assert [drawing.prompt for drawing in read_shards(tmp_path / "run" / "iteration-1" / "samples")] == [
        *range(1, PROMPTS - 2, 2)
    ]
    assert load_dpa(tmp_path / "run" / "dpa").card.training["iteration"] == 1


def test_a_share_of_the_lessons_is_replayed(finished):
    _, _, metrics = finished
    count = metrics["iterations"][2]["lessons"]
    assert count <= round((PROMPTS - 2) / 2) * 2 / 0.85 + 1


def test_the_best_reply_has_the_greatest_weighted_reward_of_those_that_ended():
    replies = (
        Reply("long", True, (), (60.0, 90.0)),
        Reply("short", True, (), (50.0, 10.0)),
        Reply("cut", False, (), (99.0, 0.0)),
        Reply(" ", True, (), (99.0, 0.0)),
    )
    drawing, card = Drawing(0, None, replies), DPACard("x")
    assert drawing.best((0.7, -0.7), card).text == "short"  # 28.0 against -21.0
    assert drawing.best((1.0, 0.0), card).text == "long"
    assert Drawing(0, None, replies[2:]).best((1.0, 0.0), card) is None


def test_ranges_and_targets_are_those_of_the_annotated_rewards():
    annotated = [[(float(value), float(100 - value))] for value in range(101)]
    assert reward_ranges(annotated) == [(50.0, 95.0), (5.0, 95.0)]
    targets = reward_targets(annotated)
    assert [round(row[1]) for row in targets] == [5, 28, 50, 72, 95]
    assert targets[0][0] > targets[-1][0]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: part
        for layer, pair in load_dpa(path).lora.items()
        for name, part in zip((f"{layer}.A", f"{layer}.B"), pair, strict=True)
    }


class KilledError(Exception):
    """Stands for a kill."""


def kill_while_fitting(monkeypatch) -> None:
    import prefmw.training.conditioned as conditioned

    steps = 0

    def dies(numbers, where, out):
        nonlocal steps
        steps += where.startswith("step")
        if steps == 24:
            raise KilledError

    monkeypatch.setattr(conditioned, "check_finite", dies)


def kill_while_sampling(monkeypatch) -> None:
    import prefmw.training.shards as shards

    as_json, lines = shards._as_json, 0

    def dies(drawing):
        nonlocal lines
        lines += drawing.direction is not None
        if lines == 10:
            raise KilledError
        return as_json(drawing)

    monkeypatch.setattr(shards, "_as_json", dies)


@pytest.mark.parametrize("kill", [kill_while_fitting, kill_while_sampling])
def test_a_killed_run_ends_with_the_same_checkpoint(finished, toy, tmp_path, monkeypatch, kill):
    folder, path, _ = finished
    train = partial(train_dpa, recipe(toy), tmp_path / "run", load_scorer=scorer, data=[data(folder)], progress=False)
    kill(monkeypatch)
    with pytest.raises(KilledError):
        train()
    monkeypatch.undo()
    again, _ = train()
    ours, theirs = tensors(again), tensors(path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_recipe_or_other_data_is_refused(finished, toy, tmp_path):
    folder, _, _ = finished
    again = partial(train_dpa, load_scorer=scorer, progress=False)
    with pytest.raises(UsageError, match="of another recipe or of other data"):
        again(recipe(toy, seed=3), folder / "run", data=[data(folder)])
    with pytest.raises(UsageError, match="of another recipe or of other data"):
        again(recipe(toy), folder / "run", data=[data(tmp_path, 30)])


def test_fewer_prompts_than_two_halves_need_are_refused(toy, tmp_path):
    with pytest.raises(UsageError, match="different prompts are too few: two halves take turns"):
        train_dpa(recipe(toy), tmp_path / "run", load_scorer=scorer, data=[data(tmp_path, 3)], progress=False)


def test_all_weights_can_be_trained_and_the_result_is_a_chat_model(toy, tmp_path):
    whole = recipe(
        toy,
        iterations=1,
        fit=Fit(rank=0, learning_rate=2e-3, epochs=16, batch=8, per_device=4, packing=True, max_tokens=256),
    )
    path, _ = train_dpa(whole, tmp_path / "run", load_scorer=scorer, data=[data(tmp_path)], progress=False)
    card = read_card(path)
    assert (card.weights, card.condition) == ("whole", "direction")
    trained, before = (load_chat_model(ModelSpec(str(folder))).module.state_dict() for folder in (path, toy))
    assert any(not torch.equal(trained[name], before[name]) for name in before)


# Sampling


def opened(toy: Path, sampler: str, scratch: Path, lora=None):
    spec = ModelSpec(str(toy))
    return opened_policy(sampler, spec, lora, scorer, temperature=1.0, max_tokens=8, scratch=scratch)


def test_a_seed_gives_the_same_reply_alone_and_in_a_crowd(toy, tmp_path):
    with opened(toy, "engine", tmp_path) as policy:
        context = policy.chat.template.encode_reply("How do I")
        crowd = policy.draw([Ask(context, seed) for seed in range(20)])
        assert policy.draw([Ask(context, 7)]) == [crowd[7]]
        assert len({one.text for one in crowd}) > 10


def test_vllm_draws_through_the_same_seam(toy, tmp_path, monkeypatch, finished):
    """vLLM's interface, played by transformers: its model is a folder that holds LoRA and weights as one."""
    loaded = {}

    class FakeLLM:
        def __init__(self, model, dtype, max_model_len):
            loaded.update(model=model, dtype=dtype, context=max_model_len)
            self._chat = load_chat_model(ModelSpec(model))

        def generate(self, prompts, options, use_tqdm):
            found = []
            for prompt, option in zip(prompts, options, strict=True):
                with torch.no_grad():
                    ids = self._chat.module.generate(
                        torch.tensor([prompt["prompt_token_ids"]]), max_new_tokens=option.max_tokens, do_sample=False
                    )[0, len(prompt["prompt_token_ids"]) :].tolist()
                found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="length")]))
            return found

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    lora = load_dpa(finished[1]).lora
    with opened(toy, "vllm", tmp_path / "policy", lora) as policy:
        context = policy.chat.template.encode_reply("How do I fall asleep")
        (drawn,) = policy.draw([Ask(context, 1)])
    assert (loaded["model"], loaded["dtype"], loaded["context"]) == (str(tmp_path / "policy"), "float32", 512)
    merged, plain = (load_chat_model(ModelSpec(folder)).module.state_dict() for folder in (loaded["model"], str(toy)))
    assert any(not torch.equal(merged[name], plain[name]) for name in plain)
    assert drawn.ended is False


def test_vllm_that_is_not_installed_is_told(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match="pip install vllm"), opened(toy, "vllm", tmp_path):
        pass


def test_an_unknown_sampler_is_refused(toy, tmp_path):
    with (
        pytest.raises(UsageError, match="no sampler 'sglang'; there is engine and vllm"),
        opened(toy, "sglang", tmp_path),
    ):
        pass


# Recipes


def test_the_paper_s_numbers_are_the_defaults():
    paper = DPARecipe("x", "y", "z")
    assert (paper.draws.first, paper.draws.directions, paper.draws.replies, paper.draws.temperature) == (80, 5, 16, 1.0)
    assert (paper.fit.learning_rate, paper.fit.epochs, paper.fit.warmup_steps, paper.fit.batch) == (1e-5, 2, 20, 64)
    assert (paper.fit.packing, paper.fit.max_tokens, paper.replay, paper.iterations) == (True, 4096, 0.15, 4)
    assert paper.card() == replace(DPACard("x"), weights="whole", reward="z")


def test_the_embedded_recipe_is_read_and_unknown_ones_are_told():
    assert load_dpa_recipe("tiny").cone == {"verbosity": (-45.0, 45.0)}
    with pytest.raises(UsageError, match="no recipe 'nobody'; there is tiny"):
        load_dpa_recipe("nobody")


@pytest.mark.parametrize(
    "changes",
    [
        {"replay": 1.0},
        {"iterations": 0},
        {"draws": Draws(first=0)},
        {"draws": Draws(temperature=0.0)},
        {"fit": Fit(rank=-1)},
        {"fit": Fit(learning_rate=0)},
        {"cone": {"verbosity": (0.0, -10.0)}},
        {"attributes": ("helpfulness", "humor")},
    ],
)
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(UsageError):
        DPARecipe("x", "y", "z", **changes)
