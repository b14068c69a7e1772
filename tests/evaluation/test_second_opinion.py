"""The second opinion learns the corpus's labels from embeddings alone; tested on a stand-in for the embedder."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from prefmw.evaluation.content import words_of
from prefmw.evaluation.second_opinion import SecondOpinion
from prefmw.training.composer import Composer


def bag_of_words(texts: list[str]) -> np.ndarray:
    """Each text as the log counts of its words in 800 buckets: an embedding that knows words and nothing else."""
    inputs = np.zeros((len(texts), 800))
    for row, text in enumerate(texts):
        for word in words_of(text):
            inputs[row, zlib.crc32(word.encode()) % 800] += 1
    return np.log1p(inputs)


@pytest.fixture(scope="module")
def opinion() -> SecondOpinion:
    return SecondOpinion(bag_of_words, answers=1200)


@pytest.mark.parametrize("axis", ["verbosity", "humor", "friendliness", "formality"])
def test_it_tells_the_poles_of_held_out_answers_apart(opinion, axis):
    composer = Composer("dev", seed=2)
    answers = [composer.answer(topic, {axis: sign}) for topic in composer.topics for sign in (-1, 1)]
    values = opinion.measure([answer.text for answer in answers])[axis]
    low = [value for value, answer in zip(values, answers, strict=True) if answer.drawn[axis] < -0.5]
    high = [value for value, answer in zip(values, answers, strict=True) if answer.drawn[axis] > 0.5]
    assert np.mean(high) > np.mean(low) + 0.6


def test_its_verdicts_lie_in_range(opinion):
    for values in opinion.measure(["Sleep.", "", "Yeah, sleep! I believe in you!"]).values():
        assert values.shape == (3,)
        assert np.all(np.abs(values) <= 1)
