"""LoRA checkpoints as they lie on disk: one safetensors file with ``lora.LAYER.A`` and ``lora.LAYER.B``, perhaps with
tensors beside them, and a card that names the model they were trained on.

Shapes: r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from prefmw.errors import ModelError

Lora = Mapping[str, tuple[Tensor, Tensor]]
"""For linear layers by their module name, A (r, in) and B (out, r), B scaled by alpha / r already."""


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """A file's tensors; ``what`` is the kind of checkpoint, for messages.

    Raises:
        ModelError: it is not there, or is cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise ModelError(f"the {what} in '{path.parent}' lacks {path.name}; copy the whole folder") from error
    except (SafetensorError, ValueError) as error:
        raise ModelError(
            f"'{path}' cannot be read; it may be cut short: {' '.join(str(error).split())[:200]}"
        ) from error


def lora_among(tensors: Mapping[str, Tensor], folder: Path, what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The LoRA among a file's tensors, by layer.

    Raises:
        ModelError: a layer has one matrix of the two, or a number that is not finite.
    """
    layers = {name[len("lora.") : -2] for name in tensors if name.startswith("lora.")}
    found = {}
    for layer in sorted(layers):
        pair = tensors.get(f"lora.{layer}.A"), tensors.get(f"lora.{layer}.B")
        if pair[0] is None or pair[1] is None or pair[0].shape[0] != pair[1].shape[1]:
            raise ModelError(f"the {what} in '{folder}' has half a LoRA on '{layer}'; copy the whole folder")
        found[layer] = (pair[0].float(), pair[1].float())
    check_numbers([part for pair in found.values() for part in pair], folder, what)
    return found


def check_numbers(tensors: list[Tensor], folder: Path, what: str) -> None:
    """Raise ModelError where some number of a checkpoint is NaN or infinite."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ModelError(f"the {what} in '{folder}' holds numbers that are not finite; train it anew")


def write_tensors(path: Path, lora: Lora, beside: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a LoRA and what stands beside it."""
    from safetensors.torch import save_file

    tensors = {f"lora.{layer}.{part}": pair[index] for layer, pair in lora.items() for index, part in enumerate("AB")}
    tensors |= beside
    save_file({name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in tensors.items()}, path)
