"""The slot cache: keys and values of many readings at once, each in a row of its own, each with its own length.

transformers' own caches keep one length for all rows, so a row that joins must be padded and one that leaves leaves a
hole. Here a row starts at position 0 whenever it comes, and every forward says which rows it is for and at which
positions its tokens stand. To a model this is a plain ``past_key_values``; explicit masks (:func:`masks`) say what each
token may see.

Shapes: R rows of one forward, N new tokens a row, T positions in use, H key-value heads, D their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

ROWS, GROWTH = 2, 128
"""What is allocated first; positions come in multiples of the latter."""


States = list[tuple[Tensor, Tensor]]
"""By layer, keys and values of one row, (H, length, D) each."""


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of ``rows`` slots, allocated when first used and grown by doubling.

    :meth:`aim` says what the next forward is about: which rows, the positions of their tokens, and how many positions
    are in use. A position beyond a row's own tokens holds rubbish that masks hide.
    """

    def __init__(self, layers: int) -> None:
        self.rows, self.positions = ROWS, GROWTH
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])
        self._rows: slice | Tensor = slice(0)
        self._at = torch.zeros(0, 0, dtype=torch.long)
        self._used = 0

    def aim(self, rows: Sequence[int], at: Tensor, used: int) -> None:
        """Set what the next forward is about.

        Args:
            rows: the slots; where they follow one another they are read in place, otherwise copied together.
            at: positions of the new tokens, (R, N); those of padding at or beyond ``used``.
            used: positions in use of the longest row, its new tokens among them.
        """
        follow = all(row == rows[0] + index for index, row in enumerate(rows))
        self._rows = slice(rows[0], rows[0] + len(rows)) if follow else torch.tensor(rows)
        self._at, self._used = at.clamp(max=self.positions), used

    def fits(self, rows: int, positions: int) -> bool:
        """Whether there is room for so many rows and positions."""
        return rows <= self.rows and positions <= self.positions

    @torch.inference_mode()
    def reserve(self, rows: int, positions: int) -> None:
        """Make room for so many rows and positions.

        An out-of-memory in the middle leaves some layers larger than they need be, which harms nothing.
        """
        if self.fits(rows, positions):
            return
        if rows > self.rows:
            rows = max(rows, 2 * self.rows)
        if positions > self.positions:
            positions = max(-(-positions // GROWTH) * GROWTH, int(1.5 * self.positions))
        rows, positions = max(rows, self.rows), max(positions, self.positions)
        for layer in self.layers:
            layer.grow(rows, positions)
        self.rows, self.positions = rows, positions

    def drop(self) -> None:
        """Free all of it; what was read is gone."""
        for layer in self.layers:
            layer.free()
        self.rows, self.positions = ROWS, GROWTH

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Zeros in a row: what a mask hides must be finite, and this one's states may not be."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[row].zero_()
                layer.values[row].zero_()

    @torch.inference_mode()
    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two rows."""
        for layer in self.layers:
            if layer.is_initialized:
                for states in (layer.keys, layer.values):
                    kept = states[one, :, :length].clone()
                    states[one, :, :length] = states[other, :, :length]
                    states[other, :, :length] = kept

    @torch.inference_mode()
    def take(self, row: int, length: int, *, on_cpu: bool = False) -> States:
        """Copies of the first ``length`` positions of a row that has read as many, by layer: keys and values
        (H, length, D) each.
        """

        def copy(states: Tensor) -> Tensor:
            kept = states[row, :, :length]
            return kept.to("cpu", copy=True) if on_cpu else kept.clone()

        return [(copy(layer.keys), copy(layer.values)) for layer in self.layers]

    @torch.inference_mode()
    def put(self, row: int, kept: States, length: int) -> None:
        """Lay the first ``length`` positions of what :meth:`take` gave into a row."""
        for layer, (keys, values) in zip(self.layers, kept, strict=True):
            layer.lazy_initialization(layer.keys, layer.values)  # where all was dropped since
            layer.keys[row, :, :length] = keys[:, :length]
            layer.values[row, :, :length] = values[:, :length]

    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(
            states.numel() * states.element_size()
            for layer in self.layers
            if layer.is_initialized
            for states in (layer.keys, layer.values)
        )


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, (rows, H, positions + 1, D) each; the last position takes what padding writes.

    A head's positions follow one another, so attention reads them in one run.
    """

    is_sliding = False
    is_compileable = False
    is_initialized: bool

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, to fit states (R, H, N, D). Zeros, since what a mask hides must still be finite."""
        if not self.is_initialized:
            rows, positions = self._cache.rows, self._cache.positions + 1
            self.keys = key_states.new_zeros(rows, key_states.shape[1], positions, key_states.shape[3])
            self.values = value_states.new_zeros(rows, value_states.shape[1], positions, value_states.shape[3])
            self.is_initialized = True

    def free(self) -> None:
        """Let go of the memory; what is left are shapes."""
        if self.is_initialized:
            self.keys, self.values = self.keys[:0].clone(), self.values[:0].clone()
            self.is_initialized = False

    def grow(self, rows: int, positions: int) -> None:
        """Allocate anew and copy, where that is more than there is."""
        if self.is_initialized:
            for name in ("keys", "values"):
                old: Tensor = getattr(self, name)
                wanted = max(rows, old.shape[0]), max(positions + 1, old.shape[2])
                if wanted != (old.shape[0], old.shape[2]):
                    new = old.new_zeros(wanted[0], old.shape[1], wanted[1], old.shape[3])
                    new[: old.shape[0], :, : old.shape[2] - 1] = old[:, :, :-1]
                    setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write states (R, H, N, D) where the cache aims; all that is in use of those rows, (R, H, T, D) each."""
        self.lazy_initialization(key_states, value_states)
        rows, used = self._cache._rows, self._cache._used
        at = self._cache._at.to(self.keys.device)  # a model may be spread over devices
        if isinstance(rows, slice):
            keys, values = self.keys[rows], self.values[rows]
            where = (torch.arange(at.shape[0], device=at.device).unsqueeze(1), at)
            keys.transpose(1, 2).index_put_(where, key_states.transpose(1, 2))
            values.transpose(1, 2).index_put_(where, value_states.transpose(1, 2))
            return keys[:, :, :used], values[:, :, :used]
        rows = rows.to(self.keys.device)
        where = (rows.unsqueeze(1), at)
        self.keys.transpose(1, 2).index_put_(where, key_states.transpose(1, 2))
        self.values.transpose(1, 2).index_put_(where, value_states.transpose(1, 2))
        return self.keys[rows, :, :used], self.values[rows, :, :used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions in use, and the first of them."""
        return self._cache._used, 0

    def get_seq_length(self) -> int:
        """Positions in use before this forward's tokens, of the longest row."""
        return self._cache._used - self._cache._at.shape[1]

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1


def masks(at: Tensor, used: int, dtype: torch.dtype, windows: dict[str, int | None]) -> dict[str, Tensor]:
    """What tokens at positions ``at`` (R, N) may see of the first ``used`` positions, by layer type.

    ``windows`` gives a layer type's sliding window, ``None`` where it sees everything before it. The masks are
    additive, (R, 1, N, used): 0 where a position is seen, the type's lowest number elsewhere.
    """
    seen = torch.arange(used, device=at.device)
    ahead = at.unsqueeze(2) - seen  # (R, N, T), how far back each position lies
    hidden = torch.finfo(dtype).min
    result = {}
    for kind, window in windows.items():
        blocked = ahead < 0 if window is None else (ahead < 0) | (ahead >= window)
        result[kind] = (
            torch.zeros(blocked.shape, dtype=dtype, device=at.device).masked_fill_(blocked, hidden).unsqueeze(1)
        )
    return result
