"""Making a model: a small recipe end to end, resumed after a kill, loaded by plain transformers."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prefmw.errors import ModelNotFoundError, UsageError
from prefmw.models.templating import ChatTemplate
from prefmw.preferences import Message
from prefmw.training.composer import Composer
from prefmw.training.sft import Recipe, load_recipe, train_sft
from prefmw.training.tokenizer import encode_chat, train_tokenizer


def small(**changes) -> Recipe:
    tiny = load_recipe("tiny")
    return dataclasses.replace(
        tiny,
        corpus={**tiny.corpus, "short_chats": 40, "chats": 90, "held_out": 8},
        tokenizer={"vocabulary": 600, "chats": 200},
        model={
            **tiny.model,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        optimizer={**tiny.optimizer, "batch_tokens": 1024, "warmup_steps": 2},
        guide={**tiny.guide, "layer": 1},
        **changes,
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [message.content for chat in Composer("train", seed=1).chats(300) for message in chat.messages]
    return train_tokenizer(texts, vocabulary=700, context=512)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Keep it short.", "naïve café 😀 \t\n  end", "12345 don't", "<|im_end|", "\x00\x7f"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_chats_are_encoded_as_the_chat_template_encodes_them(tokenizer):
    template = ChatTemplate(tokenizer, name="tiny")
    for chat in Composer("train", seed=3).chats(40):
        ids, said = encode_chat(chat.messages, tokenizer)
        prompt = template.encode(chat.messages[:-1])
        assert ids[: len(prompt)] == prompt
        answer = tokenizer.decode(ids[len(prompt) : -2])
        assert answer == chat.messages[-1].content
        assert said[len(prompt) :] == [True] * (len(ids) - len(prompt) - 1) + [False]
        turns = [message.content for message in chat.messages if message.role == "assistant"]
        ends = [index for index, is_said in enumerate(said) if is_said and not said[index + 1]]
        assert len(ends) == len(turns)
        assert {ids[end] for end in ends} == {tokenizer.eos_token_id}


def test_a_recipe_becomes_a_model_that_plain_transformers_loads(tmp_path: Path):
    folder, metrics = train_sft(small(), tmp_path / "run", progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert tokenizer.decode(prompt["input_ids"]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out_loss"] == metrics["held_out_loss"]
    assert metrics["held_out_loss"] < math.log(600) - 0.5  # what a model that knows nothing has, and well below
    assert ChatTemplate(tokenizer, name="x").encode([Message("user", "Hi")]) == prompt["input_ids"]


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch):
    import prefmw.training.sft as sft

    monkeypatch.setattr(sft, "SAVE_STEPS", 2)
    whole, expected = train_sft(small(), tmp_path / "whole", progress=False)

    class Killed(Exception):
        pass

    real = sft._Trainer.compute_loss
    seen = []

    def dies(self, *arguments, **options):
        seen.append(1)
        if len(seen) > 4:
            raise Killed
        return real(self, *arguments, **options)

    monkeypatch.setattr(sft._Trainer, "compute_loss", dies)
    with pytest.raises(Killed):
        train_sft(small(), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4").is_dir()
    half = tmp_path / "run" / "checkpoints" / "checkpoint-6"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(sft._Trainer, "compute_loss", real)
    _, resumed = train_sft(small(), tmp_path / "run", progress=False)
    assert resumed["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-4)


def test_a_folder_of_another_run_is_refused(tmp_path: Path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UsageError, match="another recipe"):
        train_sft(small(), tmp_path, progress=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        train_sft(small(), other, progress=False)


def test_a_recipe_whose_start_is_missing_is_refused_before_anything_is_written(tmp_path: Path):
    refit = load_recipe("refit")
    with pytest.raises(ModelNotFoundError, match="'nobody', which is not in this installation"):
        train_sft(dataclasses.replace(refit, model={"start": "nobody"}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nobody", "missing.toml"])
def test_an_unknown_recipe_is_refused(name):
    with pytest.raises(UsageError, match="no recipe"):
        load_recipe(name)


def test_a_recipe_that_lacks_a_number_is_refused(tmp_path: Path):
    lines = (files("prefmw.training") / "recipes" / "tiny.toml").read_text().splitlines()
    (tmp_path / "x.toml").write_text("\n".join(line for line in lines if not line.startswith("beta2")))
    with pytest.raises(UsageError, match="lacks beta2"):
        load_recipe(str(tmp_path / "x.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 1", "seed = -1", "seed is a whole number from 0"),
        (
            "short_chats = 560_000",
            "short_chats = -4",
            r"\[corpus\] short_chats is a whole number from 0 to 1e\+08, got -4",
        ),
        ("short_chats = 560_000", 'short_chats = "many"', "got 'many'"),
        ("short_chats = 560_000", "short_chats = 4.5", "got 4.5"),
        ("held_out = 200", "held_out = 0", "held_out is a whole number from 1"),
        ("follow_rate = 0.8", "follow_rate = 2", "follow_rate is a number from 0 to 1, got 2"),
        ("learning_rate = 6e-3", "learning_rate = nan", "got nan"),
        ("vocabulary = 8192", "vocabulary = 10", "vocabulary is a whole number from 300"),
        ("hidden_size = 160", "hidden_size = 30", "hidden_size is a multiple of twice num_attention_heads"),
        ("num_key_value_heads = 2", "num_key_value_heads = 3", "num_attention_heads is a multiple of"),
        ("epochs = 1", "epochs = 1\nwarmth = 2", r"\[optimizer\] has no warmth"),
        ("layer = 3", "layer = 9", "reads layer 9, which the model has not"),
    ],
)
def test_a_recipe_out_of_range_is_refused_by_part_and_name(tmp_path: Path, old, new, message):
    text = (files("prefmw.training") / "recipes" / "tiny.toml").read_text()
    assert old in text
    (tmp_path / "x.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=message):
        load_recipe(str(tmp_path / "x.toml"))


def test_a_recipe_without_chats_is_refused(tmp_path: Path):
    text = (files("prefmw.training") / "recipes" / "refit.toml").read_text()
    (tmp_path / "x.toml").write_text(text.replace("chats = 14_000", "chats = 0"))
    with pytest.raises(UsageError, match="has no chats"):
        load_recipe(str(tmp_path / "x.toml"))


def test_a_file_is_no_folder_for_a_run(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="is no folder"):
        train_sft(small(), tmp_path / "run", progress=False)


def test_a_broken_recipe_is_refused(tmp_path: Path):
    (tmp_path / "x.toml").write_text("name = 'x'\nseed = 1\n")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(str(tmp_path / "x.toml"))
