"""What teaches a small model the meaning of words, beside the next token, while it trains.

From its corpus alone a model of three million parameters learns wordings by heart: it found the topic of fewer new
questions than a classifier on words did. So its token embeddings begin as a sentence embedder's, and two linear heads
on an inner layer learn what the embedder makes of the wordings in a message, and what the composer knows of every
answer: its topic and the poles asked for. The heads are thrown away when training ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedTokenizerFast

from prefmw.models.embedder import Embed
from prefmw.training.composer import Chat
from prefmw.training.styles import AXES
from prefmw.training.topics import load_topics


def begin_embeddings(embeddings: nn.Embedding, tokenizer: PreTrainedTokenizerFast, embed: Embed, size: float) -> None:
    """Add to every token's random embedding what ``embed`` makes of its text, in its principal directions.

    Args:
        embeddings: (V, D), D at most the embedder's.
        size: the standard deviation of what is added, in that of the random embeddings.
    """
    weight = embeddings.weight
    vectors = torch.from_numpy(embed([tokenizer.decode([index]).strip() or "." for index in range(len(weight))]))
    vectors = vectors - vectors.mean(0)
    directions = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -weight.shape[1] :]
    meanings = vectors @ directions  # (V, D)
    with torch.no_grad():
        weight += meanings * (size * weight.std() / meanings.std())


class Sources:
    """The sentences that messages are made from, numbered as they are met."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def lessons(self, chat: Chat, ends: Sequence[int]) -> dict[str, Tensor]:
        """What ``chat`` teaches.

        Args:
            ends: where each of its messages ends, in tokens.

        Returns:
            ``sources`` (S, 2), an end and a sentence of the message that ends there; ``answers`` (A, 2 + axes), the
            end before each answer, its topic, and the poles asked for, 0 to 2, 1 where none was.
        """
        numbers = self.texts
        sources = [
            (end, numbers.setdefault(text, len(numbers)))
            for end, texts in zip(ends, chat.sources, strict=True)
            for text in texts
        ]
        said = [index for index, message in enumerate(chat.messages) if message.role == "assistant"]
        answers = [
            (ends[index - 1], _topic_numbers()[answer.topic], *(answer.asked.get(axis, 0) + 1 for axis in AXES))
            for index, answer in zip(said, chat.answers, strict=True)
        ]
        return {
            "sources": torch.tensor(sources, dtype=torch.int32).reshape(-1, 2),
            "answers": torch.tensor(answers, dtype=torch.int32),
        }


@cache
def _topic_numbers() -> dict[str | None, int]:
    """A number for every topic, and the last one for none."""
    return {topic: number for number, topic in enumerate([*(known.id for known in load_topics()), None])}


class Guide(nn.Module):
    """The two heads, and their loss.

    Args:
        width: of the model's hidden states.
        layer: after how many of its layers they are read.
        meanings: the embedder's vectors of all sources, (N, D).
        meaning, labels: what the heads' losses weigh beside the next token's.
    """

    meanings: Tensor

    def __init__(self, width: int, layer: int, meanings: Tensor, *, meaning: float, labels: float) -> None:
        super().__init__()
        self.layer = layer
        self._weights = (meaning, labels)
        self.meaning = nn.Linear(width, meanings.shape[1])
        self.labels = nn.Linear(width, len(_topic_numbers()) + 3 * len(AXES))
        self.register_buffer("meanings", meanings, persistent=False)

    def forward(self, hidden: Tensor, sources: Tensor, answers: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            hidden: (N, D), a batch's hidden states, flat.
            sources: (S, 2) and
            answers: (A, 2 + axes), as :meth:`Sources.lessons` has them, with places in ``hidden``.
        """
        weigh_meaning, weigh_labels = self._weights
        places, message = torch.unique(sources[:, 0], return_inverse=True)
        wanted = self.meanings.new_zeros(len(places), self.meanings.shape[1])
        wanted = normalize(wanted.index_add_(0, message, self.meanings[sources[:, 1]]), dim=1)  # (M, E)
        meant = normalize(self.meaning(_scaled(hidden[places])), dim=1)
        loss = weigh_meaning * (1 - (meant * wanted).sum(1)).sum() / max(1, len(places))
        sizes = [len(_topic_numbers()), *[3] * len(AXES)]
        topics, *poles = self.labels(_scaled(hidden[answers[:, 0]])).split(sizes, dim=1)
        right = cross_entropy(topics, answers[:, 1])
        for index, logits in enumerate(poles):
            right = right + cross_entropy(logits, answers[:, 2 + index])
        total: Tensor = loss + weigh_labels * right
        return total


def _scaled(hidden: Tensor) -> Tensor:
    """Each row with a root mean square of 1."""
    hidden = hidden.float()
    return hidden * hidden.pow(2).mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
