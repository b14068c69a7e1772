"""A second opinion on style that shares no word list with the oracles: a linear classifier on sentence embeddings.

It is fitted, per axis, on answers composed for training, to tell the poles by the values that the composer drew. So it
knows the corpus's labels but no lexicon, and the oracles know lexicons but no label: where both agree, neither's blind
spot decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefmw.models.embedder import Embedder
from prefmw.training.composer import Composer
from prefmw.training.styles import AXES

LABELLED = 0.34
"""The least mean of an answer's drawn values that labels it with a pole; between the two poles' it is neutral."""


class SecondOpinion:
    """Reads a reply's style as the expected pole, in [-1, 1], by multinomial logistic regression on its embedding.

    Args:
        embed: texts to embeddings (N, D); by default all-MiniLM-L6-v2.
        answers: composed answers to fit on.
        seed: of the composer.
    """

    def __init__(self, embed: Any = None, *, answers: int = 3000, seed: int = 11) -> None:
        from sklearn.linear_model import LogisticRegression

        self._embed = embed or Embedder()
        composer = Composer("train", seed=seed)
        composed = [
            composer.answer(composer.random.choice(composer.topics), composer.draw_style(None)) for _ in range(answers)
        ]
        inputs = self._embed([answer.text for answer in composed])
        self._models = {}
        for axis in AXES:
            drawn = np.array([answer.drawn[axis] for answer in composed])
            labels = np.where(np.abs(drawn) < LABELLED, 0, np.sign(drawn)).astype(int)
            self._models[axis] = LogisticRegression(C=30.0, max_iter=2000, class_weight="balanced").fit(inputs, labels)

    def measure(self, texts: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Per axis the expected pole of each text, (N,), in [-1, 1]."""
        inputs = self._embed(list(texts))
        return {axis: model.predict_proba(inputs) @ model.classes_ for axis, model in self._models.items()}
