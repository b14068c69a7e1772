"""The embedded chat model: its budgets, that plain transformers loads it, that it answers, refuses and never loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefmw.embedded import embedded_path
from prefmw.evaluation.content import read_content, repeats
from prefmw.evaluation.held_out import held_out_items
from prefmw.evaluation.steer import Condition, answer_items
from prefmw.models import ModelSpec, load_chat_model
from prefmw.personalizer import Personalizer
from prefmw.plans import Defaults, Options
from prefmw.preferences import Message, default_dimensions
from prefmw.training.sft import load_recipe
from prefmw.training.styles import load_talk
from prefmw.training.topics import load_topics

FOLDER = embedded_path("tiny")


@pytest.fixture
def personalizer(store, tiny) -> Personalizer:
    store.add_user("alice", actor="test")
    return Personalizer(store, lambda: tiny, default_dimensions(), Defaults(max_tokens=256))


def test_it_keeps_its_budgets():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert sum(weight.numel() for weight in model.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 7_000_000
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 2048
    assert model.dtype == torch.bfloat16
    assert 4000 <= len(AutoTokenizer.from_pretrained(FOLDER)) <= 8192


def test_its_shape_is_its_recipes():
    config = json.loads((FOLDER / "config.json").read_text())
    recipe = load_recipe("tiny")
    assert {key: config[key] for key in recipe.model} == recipe.model
    assert config["vocab_size"] == recipe.tokenizer["vocabulary"]


def test_plain_transformers_answers_with_it():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    topic = next(topic for topic in load_topics() if topic.id == "falling-asleep")
    chat = [{"role": "user", "content": topic.questions[0]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=200, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert read_content(text, topic).relevant, text


def test_it_loads_in_half_a_second():
    seconds = min(load_chat_model(ModelSpec(name="tiny", path=FOLDER)).load_s for _ in range(3))
    assert seconds < 0.5


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_held_out_questions_are_answered_on_topic(tiny, temperature):
    answered, _ = answer_items(
        list(held_out_items("dev", 16)), Condition("none", None, temperature), tiny, default_dimensions()
    )
    assert sum(answer.relevant for answer in answered) >= 0.85 * len(answered)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_held_out_questions_are_answered_without_loops(tiny, temperature):
    answered, _ = answer_items(
        list(held_out_items("dev", 16)), Condition("none", None, temperature), tiny, default_dimensions()
    )
    assert sum(answer.repeats for answer in answered) <= 0.05 * len(answered)


def test_what_it_never_saw_it_says_it_does_not_know(personalizer):
    questions = load_talk().unknown["questions"]["dev"][:30]
    texts = [personalizer.reply("alice", [Message("user", question)], Options(seed=1)).text for question in questions]
    assert not any(map(repeats, texts)), texts
    assert sum("everyday topics" in text for text in texts) >= 0.8 * len(texts), texts


def test_a_long_conversation_stays_within_what_was_trained(personalizer):
    messages: list[Message] = []
    for topic in load_topics()[::12]:
        messages.append(Message("user", topic.questions[0]))
        reply = personalizer.reply("alice", messages, Options(seed=1))
        assert not repeats(reply.text), reply.text
        assert read_content(reply.text, topic).relevant, reply.text
        messages.append(Message("assistant", reply.text))
    assert reply.input_tokens > 300


def test_the_card_says_what_it_is():
    card = Path(FOLDER / "README.md").read_text()
    assert "demonstrator" in card
    assert "not an assistant" in card
