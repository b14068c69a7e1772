"""What tests of the engine share: a small model, and an engine on it."""

from __future__ import annotations

import pytest

from prefmw.decoding import Engine
from tests.toymodels import make_model

VOCABULARY = 300


@pytest.fixture(scope="module")
def model():
    return make_model(VOCABULARY, context=256)


@pytest.fixture
def engine(model):
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    yield engine
    engine.close()
