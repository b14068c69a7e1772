"""The read-out: from a clause to the side of each dimension that its writer is on.

N clauses, D hidden, K dimensions. Similarity of sentence embeddings says what a clause is about, not which side it
takes: "no jokes" lies next to "jokes". So the read-out is a low-rank adapter on the embedder's own encoder and a linear
head on its mean-pooled states, three outputs a dimension (negative pole, neither, positive pole); fitted by ``prefmw
prefs fit-readout``, kept as safetensors with the states of the anchor bank. Those nearest to a clause's state, which is
all that the head reads of it, explain what it finds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prefmw.errors import UsageError
from prefmw.models.embedder import Embedder
from prefmw.models.packing import packed
from prefmw.preferences.anchors import Anchor
from prefmw.preferences.inference import Read

FORM = "2"
"""How clauses are read and explained; a read-out of another form is refused."""

LONGEST = 128
"""Tokens of a clause that are read."""

BATCH = 64


class LowRank(nn.Module):
    """A linear layer and a low-rank change of it: y = W x + B A x.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, section 4.1, without its scale.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        rows, columns = layer.weight.shape
        self.layer = layer
        self.a = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    @property
    def weight(self) -> Tensor:
        """W + B A, (rows, columns), for an encoder that looks at it."""
        return self.layer.weight + self.b @ self.a

    def forward(self, given: Tensor) -> Tensor:
        """(..., columns) to (..., rows)."""
        changed: Tensor = self.layer(given) + given @ self.a.T @ self.b.T
        return changed


class Reader(nn.Module):
    """An encoder and a head: token ids to logits, (N, K, 3)."""

    def __init__(self, encoder: nn.Module, width: int, dimensions: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 3 * dimensions)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of negative pole, neither, positive pole."""
        return self.logits(self.pooled(input_ids, attention_mask))

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of a text's states, (N, D)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (N, T, D)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        mean: Tensor = (states * mask).sum(1) / mask.sum(1)
        return mean

    def logits(self, pooled: Tensor) -> Tensor:
        """(N, D) to (N, K, 3)."""
        logits: Tensor = self.head(pooled)
        return logits.view(len(logits), -1, 3)


def tokens(embedder: Embedder, clauses: Sequence[str]) -> dict[str, Tensor]:
    """N clauses as a :class:`Reader` takes them, (N, T), without the full stops at their ends: one means nothing, and
    yet an encoder is less sure with some and with others without.
    """
    return embedder.tokens([clause.rstrip(" .") or clause for clause in clauses], LONGEST)


def linear_layers(encoder: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that an adapter is put on: all of the encoder's blocks."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and "pooler" not in name:
            yield name, module


def sides(logits: Tensor) -> NDArray[np.float64]:
    """Probability of the positive pole less the negative's, in [-1, 1]: (N, K, 3) to (N, K)."""
    odds = logits.double().softmax(-1)
    return np.asarray((odds[..., 2] - odds[..., 0]).numpy(), dtype=np.float64)


class ReadOut:
    """A fitted read-out; its encoder is put together when it is first used.

    Args:
        embedder: the one it was fitted to.
        dimensions: the names of K dimensions' poles, in the order of its outputs.
        threshold: the least size of a value that is a statement; what is smaller is abstained from.
        anchors: A labelled statements, which explain what it finds.
        tensors: ``head.weight`` (3 K, D), ``head.bias`` (3 K,), ``NAME.a`` and ``NAME.b`` for every linear layer, and
            ``anchors``, what :meth:`read` makes of the anchors, (A, D).
    """

    def __init__(
        self,
        embedder: Embedder,
        dimensions: Mapping[str, tuple[str | None, str]],
        threshold: float,
        anchors: Sequence[Anchor],
        tensors: dict[str, Tensor],
    ) -> None:
        self.embedder = embedder
        self.dimensions = tuple(dimensions)
        self.poles = tuple(dimensions.values())
        self.threshold = threshold
        self._tensors = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
        self.anchors = tuple(anchors)
        self._reader: Reader | None = None
        self._lock = threading.Lock()
        self.vectors: NDArray[np.float32] = self._tensors["anchors"].float().numpy()

    def version(self) -> str:
        """A hash of all that its values depend on."""
        digest = hashlib.sha256(repr((FORM, self.embedder.name, self.dimensions, self.poles, self.threshold)).encode())
        for name in sorted(self._tensors):
            digest.update(self._tensors[name].numpy().tobytes())
        return digest.hexdigest()

    def read(self, clauses: Sequence[str]) -> Read:
        """Per clause and dimension the probability of the positive pole less the negative's, in [-1, 1]; and per clause
        the state that it was read from, as a unit vector.
        """
        with self._lock:
            if self._reader is None:
                self._reader = self._built()
        reader = self._reader
        values = [np.zeros((0, len(self.dimensions)))]
        vectors = [np.zeros((0, reader.head.in_features), dtype=np.float32)]
        with torch.inference_mode():
            for at in range(0, len(clauses), BATCH):
                pooled = reader.pooled(**tokens(self.embedder, clauses[at : at + BATCH]))
                values.append(sides(reader.logits(pooled)))
                vectors.append(nn.functional.normalize(pooled, dim=1).numpy())
        return Read(np.concatenate(values), np.concatenate(vectors))

    def continued(self, reader: Reader) -> None:
        """Put what was learned into a reader whose encoder is :func:`adapted`, to learn further.

        Raises:
            UsageError: it is of another rank or other dimensions.
        """
        theirs = {**changes(reader.encoder), **{f"head.{key}": value for key, value in reader.head.named_parameters()}}
        for name, value in theirs.items():
            if name not in self._tensors or self._tensors[name].shape != value.shape:
                raise UsageError("the read-out to start from is of another rank or reads other dimensions")
        with torch.no_grad():
            for name, value in theirs.items():
                value.copy_(self._tensors[name])

    def save(self, path: Path) -> None:
        """Write it as float16 safetensors, with what it was fitted on beside the numbers."""
        from safetensors.torch import save_file

        about = {
            "form": FORM,
            "embedder": self.embedder.name,
            "dimensions": json.dumps(dict(zip(self.dimensions, self.poles, strict=True))),
            "threshold": repr(self.threshold),
            "anchors": json.dumps(self.anchors, ensure_ascii=False),
        }
        save_file({name: tensor.contiguous() for name, tensor in self._tensors.items()}, path, metadata=about)

    def _built(self) -> Reader:
        theirs = self.embedder.encoder
        own = {id(layer.weight) for _, layer in linear_layers(theirs)}
        encoder = copy.deepcopy(theirs, {id(one): one for one in theirs.parameters() if id(one) not in own})
        with torch.no_grad():
            for name, layer in linear_layers(encoder):
                layer.weight += (self._tensors[f"{name}.b"].float() @ self._tensors[f"{name}.a"].float()).to(
                    layer.weight
                )
        reader = Reader(packed(encoder), self._tensors["head.weight"].shape[1], len(self.dimensions))
        reader.head.load_state_dict({key: self._tensors[f"head.{key}"].float() for key in ("weight", "bias")})
        return reader.eval()


def load_readout(path: Path, embedder: Embedder) -> ReadOut:
    """Read what :meth:`ReadOut.save` wrote.

    Raises:
        UsageError: the file is not there, is no read-out, or was fitted to another embedder.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fitted_to, dimensions = about["embedder"], json.loads(about["dimensions"])
        poles = {key: (negative, positive) for key, (negative, positive) in dimensions.items()}
        anchors = [Anchor(*anchor) for anchor in json.loads(about["anchors"])]
        readout = ReadOut(embedder, poles, float(about["threshold"]), anchors, tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"'{path}' is no read-out; make one with 'prefmw prefs fit-readout'") from error
    if about.get("form") != FORM:
        raise UsageError(
            f"the read-out '{path}' was made by an earlier version; make it again with 'prefmw prefs fit-readout'"
        )
    if fitted_to != embedder.name:
        raise UsageError(
            f"the read-out '{path}' was fitted to {fitted_to}, not to {embedder.name}; fit one with 'prefmw prefs "
            "fit-readout' and name it by the setting 'readout'"
        )
    return readout


def adapted(encoder: nn.Module, rank: int) -> nn.Module:
    """A copy of the encoder whose linear layers learn a low-rank change, and nothing else does."""
    encoder = copy.deepcopy(encoder).requires_grad_(False)
    for name, layer in list(linear_layers(encoder)):
        parent, _, own = name.rpartition(".")
        setattr(encoder.get_submodule(parent), own, LowRank(layer, rank))
    return encoder


def changes(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """What :func:`adapted` layers learn, by the names that :class:`ReadOut` takes."""
    layers = [(name, layer) for name, layer in encoder.named_modules() if isinstance(layer, LowRank)]
    return {f"{name}.{part}": getattr(layer, part) for name, layer in layers for part in "ab"}
