"""What tests of the adapters share: two people and a chat model on the small model."""

from __future__ import annotations

import pytest

from prefmw.adapters.langchain import ChatPrefMW
from prefmw.adapters.opening import close_opened
from prefmw.bootstrap import close_engines, open_store
from prefmw.settings import load_settings

QUESTION = "How do I fall asleep faster?"


@pytest.fixture(scope="package", autouse=True)
def engines():
    """Models stay loaded from test to test."""
    yield
    close_engines()


@pytest.fixture(autouse=True)
def databases(home):
    """Every test's home holds a database of its own, whose connections end with the test."""
    yield
    close_opened()


@pytest.fixture
def people():
    store = open_store(load_settings())
    store.add_user("alice", persona="a nurse on night shifts", actor="test")
    store.add_user("bob", persona="a cook", actor="test")
    yield store
    store.close()


@pytest.fixture
def chat(toy, people):
    return ChatPrefMW(model=str(toy), method="linear", max_tokens=24, seed=1)
