"""What teaches the model meanings: embeddings begun, places found, labels right, and heads that can learn them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefmw.training.composer import Composer
from prefmw.training.guide import Guide, Sources, begin_embeddings
from prefmw.training.styles import AXES
from prefmw.training.tokenizer import encode_chat, train_tokenizer
from prefmw.training.topics import load_topics


@pytest.fixture(scope="module")
def chats():
    return list(Composer("train", seed=5).chats(120))


@pytest.fixture(scope="module")
def tokenizer(chats):
    return train_tokenizer((m.content for chat in chats for m in chat.messages), vocabulary=900, context=2048)


def embed(texts):
    """Words with an e in one direction, those without in another."""
    return np.array([[1.0, 0.0, 0.1] if "e" in text else [0.0, 1.0, 0.1] for text in texts], dtype=np.float32)


def test_embeddings_begin_as_the_embedder_has_them(tokenizer):
    torch.manual_seed(0)
    embeddings = torch.nn.Embedding(len(tokenizer), 2)
    torch.nn.init.normal_(embeddings.weight, std=0.02)
    begin_embeddings(embeddings, tokenizer, embed, size=10.0)
    with_e = torch.tensor(["e" in tokenizer.decode([index]) for index in range(len(tokenizer))])
    direction = embeddings.weight[with_e].mean(0) - embeddings.weight[~with_e].mean(0)
    projected = embeddings.weight @ direction
    assert projected[with_e].min() > projected[~with_e].max()
    assert embeddings.weight.std().item() == pytest.approx(0.2, rel=0.5)


def test_lessons_are_where_their_messages_end(chats, tokenizer):
    sources = Sources()
    for chat in chats:
        ids, _ = encode_chat(chat.messages, tokenizer)
        ends = [at for at, token in enumerate(ids) if token == tokenizer.eos_token_id]
        lessons = sources.lessons(chat, ends)
        texts = list(sources.texts)
        for end, number in lessons["sources"].tolist():
            assert texts[number] in chat.sources[ends.index(end)]
        for (end, topic, *poles), answer in zip(lessons["answers"].tolist(), chat.answers, strict=True):
            at = ends.index(end)
            assert chat.messages[at].role == "user"
            assert chat.messages[at + 1].content == answer.text
            assert (load_topics()[topic].id if topic < len(load_topics()) else None) == answer.topic
            assert {axis: pole - 1 for axis, pole in zip(AXES, poles, strict=True) if pole != 1} == dict(answer.asked)
    assert len(sources.texts) == len(set(sources.texts.values())) > 100


def test_the_heads_learn_what_hidden_states_hold():
    torch.manual_seed(0)
    meanings = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)
    guide = Guide(16, 3, meanings, meaning=1.0, labels=1.0)
    hidden = torch.randn(8, 16)
    sources = torch.tensor([[0, 0], [3, 1], [3, 2], [6, 3]])
    answers = torch.tensor([[3, 2, 0, 1, 2, 1, 1], [6, 85, 1, 1, 1, 1, 0]])
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
    first = guide(hidden, sources, answers).item()
    for _ in range(200):
        loss = guide(hidden, sources, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 3
    assert loss.item() < 0.05
    assert "meanings" not in guide.state_dict()  # a checkpoint need not hold them


def test_a_batch_without_sources_teaches_labels_alone():
    guide = Guide(16, 3, torch.ones(1, 6), meaning=1.0, labels=1.0)
    hidden, answers = torch.randn(8, 16, requires_grad=True), torch.tensor([[3, 2, 0, 1, 2, 1, 1]])
    guide(hidden, torch.empty(0, 2, dtype=torch.long), answers).backward()
    assert hidden.grad.abs().sum(1).nonzero().flatten().tolist() == [3]
    assert guide.meaning.weight.grad is None or not guide.meaning.weight.grad.any()
