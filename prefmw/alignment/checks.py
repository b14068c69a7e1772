"""What every equation begins with: shapes agree, logits are logits, and excluded columns stay out of differences."""

from __future__ import annotations

import torch
from torch import Tensor


def check_logits(*logits: Tensor) -> list[Tensor]:
    """The tensors as float32, if all are (B, V) of one shape and hold finite values or -inf (an excluded column).

    Raises:
        ValueError: another rank, differing shapes, or a NaN or +inf.
    """
    shapes = [tuple(z.shape) for z in logits]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"expected logits of one shape (rows, vocabulary), got {', '.join(map(str, shapes))}")
    for z in logits:
        if z.numel() and not bool(z.amax() < torch.inf):  # NaN is the largest, and not below
            raise ValueError(
                "logits hold NaN or +inf; the model overflowed: load it in a wider dtype (bfloat16, float32)"
            )
    return [z.float() for z in logits]


def per_row(value: Tensor | float, logits: Tensor, name: str, low: float = 0.0) -> Tensor:
    """``value`` as a float32 column (B, 1) beside ``logits`` (B, V), one number for all rows or one per row.

    Raises:
        ValueError: not one per row, not finite, or below ``low``.
    """
    column = torch.as_tensor(value, dtype=torch.float32, device=logits.device)
    if column.ndim > 1 or (column.ndim == 1 and column.shape[0] != logits.shape[0]):
        raise ValueError(f"{name} is one number or one per row ({logits.shape[0]},), got shape {tuple(column.shape)}")
    if not bool((column.isfinite() & (column >= low)).all()):
        raise ValueError(f"{name} is finite and at least {low:g}, got {column.tolist()}")
    return column.expand(logits.shape[0]).unsqueeze(1)


def difference(z0: Tensor, z1: Tensor) -> Tensor:
    """d = z1 - z0, (B, V); 0 where either is -inf, since such a column has no finite direction."""
    return (z1 - z0).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
