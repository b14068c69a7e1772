"""One causal language model as the engine uses it: rows of tokens in, next-token logits out, over a slot cache.

The model is transformers' own and stays as it is: what differs from row to row (length, LoRA gate, head scale) is given
to it as positions, masks and hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefmw.decoding import attention
from prefmw.decoding.graphs import StepGraphs
from prefmw.decoding.linears import GatedLinears
from prefmw.decoding.slots import SlotCache, States, masks
from prefmw.decoding.underway import forward_of, under_way
from prefmw.decoding.values import whole
from prefmw.errors import ModelError, UsageError


@dataclass(eq=False)
class Row:
    """One view in the making: what of it lies in the slot cache, and what is still to be read.

    Attributes:
        slot: the cache's row.
        cached: the tokens whose keys and values the slot holds.
        pending: the tokens to read next, at least one before a forward.
        adapter: the LoRA that it is read with, if any.
        head_scale: (D,), multiplied into the last hidden state before the head, if any.
        logits: (V,), after the last token read.
    """

    slot: int
    pending: list[int]
    cached: list[int] = field(default_factory=list)
    adapter: str | None = None
    head_scale: Tensor | None = None
    logits: Tensor | None = None


Read = tuple[Sequence[int], Sequence[int]]
"""A context and a reply to it, as token ids."""


class Backbone:
    """A model with its slot cache.

    Args:
        model: a transformers causal language model, in evaluation mode, on its device.
        vocabulary: columns of the logits that are real tokens; padded ones behind them are cut off.
        pack: whether weights may be copied, to be read more quickly.
        head: what its last hidden states, (R, M, D), go through before the output embeddings; ``None`` for nothing.

    Attributes:
        windows: the kinds of its attention layers with their sliding windows, ``None`` for none.
        exact: the tokens up to which rows of any length can share its positions; ``None`` for no such bound.
        width: size of its hidden states.
        read: token ids below it can be read.
        cache: the rows' keys and values.
        linears: its linear layers, where adapters are added.

    Raises:
        ModelError: its attention or cache is of a kind that slots cannot hold.
        UsageError: ``vocabulary`` is not a number of tokens that it has.
    """

    def __init__(self, model: Any, *, vocabulary: int, pack: bool = True, head: nn.Module | None = None) -> None:
        self._head = head
        self.model = model
        self.vocabulary = whole("vocabulary", vocabulary, least=1)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.windows = attention_windows(model)
        self.exact = exact_positions(model)
        self._dtype: torch.dtype = model.dtype
        self._layers = int(model.config.get_text_config().num_hidden_layers)
        embeddings = model.get_output_embeddings()
        if embeddings is None:
            raise ModelError(f"{type(model).__name__} has no output embeddings to read logits from")
        self.width = int(embeddings.weight.shape[1])
        self.read = int(model.get_input_embeddings().weight.shape[0])
        if vocabulary > (tokens := min(self.read, int(embeddings.weight.shape[0]))):
            raise UsageError(f"a vocabulary of {vocabulary} tokens exceeds the {tokens} of {type(model).__name__}")
        self.linears = GatedLinears(model, pack=pack)
        self._own_attention = attention.use_on(model, self.device)
        self.graphs = StepGraphs(self) if self.device.type == "cuda" else None
        self.cache = SlotCache(self._layers)
        self._hook = embeddings.register_forward_pre_hook(self._before_head)

    def release(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        self.linears.release()
        if self._own_attention:
            attention.give_back(self.model)
            self._own_attention = False
        self.drop()

    def drop(self) -> None:
        """Free the cache, and the graphs, which point at it."""
        if self.graphs is not None:
            self.graphs.clear()
        self.cache.drop()

    def reserve(self, rows: int, positions: int) -> None:
        """Make room in the cache; where that allocates it anew, forget the graphs, which point at the old one."""
        if not self.cache.fits(rows, positions):
            if self.graphs is not None:
                self.graphs.clear()
            self.cache.reserve(rows, positions)

    def forward(self, rows: Sequence[Row], take: Sequence[int]) -> None:
        """Read the first ``take[i]`` pending tokens of each row, all in one forward; at least one row takes some.

        The ``logits`` of a row that takes some are then those after its last token read.
        """
        width, lengths = max(take), [len(row.cached) for row in rows]
        used = max(length + count for length, count in zip(lengths, take, strict=True))
        self.reserve(max(row.slot for row in rows) + 1, used)
        tokens = [[*row.pending[:count], *[0] * (width - count)] for row, count in zip(rows, take, strict=True)]
        logits = self._read(rows, torch.tensor(tokens), torch.tensor(lengths), torch.tensor(take), used)
        for row, count, after in zip(rows, take, logits.unbind(), strict=True):
            if count:
                row.cached += row.pending[:count]
                del row.pending[:count]
                row.logits = after

    @torch.inference_mode()
    def log_probabilities(
        self, pairs: Sequence[Read], adapter: str | None = None, head_scale: Tensor | None = None
    ) -> list[Tensor]:
        """log p of every token of a reply after its context and the tokens before it, nats, in one forward.

        Args:
            pairs: R of (context, reply), token ids, neither empty.
            adapter: the LoRA that all are read with, if any.
            head_scale: (D,), multiplied into the last hidden states before the head, if any.

        Returns:
            For each, (T,), float32, on the CPU.
        """
        texts = [[*context, *reply] for context, reply in pairs]
        width, longest = max(map(len, texts)), max(len(reply) for _, reply in pairs)
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in texts], device=self.device)  # (R, N)
        first = torch.tensor([len(context) - 1 for context, _ in pairs], device=self.device)
        places = (first.unsqueeze(1) + torch.arange(longest, device=self.device)).clamp(max=width - 1)  # (R, T)
        scale = None if head_scale is None else head_scale.to(self.device).expand(len(pairs), -1)
        with forward_of(self, places, scale):  # attention is causal: no token looks at the padding behind a row
            try:
                if adapter is not None:
                    self.linears.begin(self.linears.gates([adapter] * len(pairs)))
                logits = self.model(input_ids=tokens, use_cache=False).logits[..., : self.vocabulary].float()
            finally:
                self.linears.end()
        said = tokens.gather(1, (places + 1).clamp(max=width - 1))
        found = logits.gather(2, said.unsqueeze(2)).squeeze(2) - logits.logsumexp(2)  # (R, T)
        return [row[: len(reply)].cpu() for row, (_, reply) in zip(found, pairs, strict=True)]

    @torch.inference_mode()
    def last_states(self, texts: Sequence[Sequence[int]], adapter: str | None = None) -> list[Tensor]:
        """The hidden state after the final norm at the last token of each of R texts, (D,), float32, on the CPU."""
        width = max(map(len, texts))
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in texts], device=self.device)  # (R, N)
        try:
            if adapter is not None:
                self.linears.begin(self.linears.gates([adapter] * len(texts)))
            states = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # (R, N, D)
        finally:
            self.linears.end()
        return [states[row, len(ids) - 1].float().cpu() for row, ids in enumerate(texts)]

    def restore(self, row: Row, tokens: Sequence[int], states: States) -> None:
        """Lay kept states of ``tokens`` into an empty row."""
        self.reserve(row.slot + 1, len(tokens))
        self.cache.put(row.slot, states, len(tokens))
        row.cached = list(tokens)

    def copy_of(self, row: Row, *, on_cpu: bool = False) -> States:
        """The states of what a row has read, to be kept."""
        return self.cache.take(row.slot, len(row.cached), on_cpu=on_cpu)

    @torch.inference_mode()
    def _read(self, rows: Sequence[Row], tokens: Tensor, lengths: Tensor, take: Tensor, used: int) -> Tensor:
        """Logits (R, V) after the last real token of each row of ``tokens`` (R, N)."""
        at = lengths.unsqueeze(1) + torch.arange(tokens.shape[1])  # (R, N)
        gates = self.linears.gates([row.adapter for row in rows])
        scale = self._scales(rows)
        slots = [row.slot for row in rows]
        if self.graphs is not None and tokens.shape[1] == 1 and slots == list(range(len(rows))):
            return self.graphs.step(tokens, at, gates, scale, used)
        reach = used
        if self._own_attention and tokens.shape[1] == 1 and self.cache.positions <= 2 * used:
            reach = self.cache.positions + 1  # all there is, so that keys lie side by side
        self.cache.aim(slots, at.to(self.device), reach)
        last = (take - 1).clamp_min(0).to(self.device)
        return self.call(tokens.to(self.device), at.to(self.device), used, reach, last, gates, scale)

    def call(
        self,
        tokens: Tensor,
        at: Tensor,
        used: int,
        reach: int,
        last: Tensor,
        gates: Sequence[tuple[str, Tensor]],
        scale: Tensor | None,
    ) -> Tensor:
        """One forward over the rows that the cache aims at.

        Args:
            tokens: (R, N), on the model's device, likewise all others.
            at: their positions, (R, N).
            used: positions in use of the longest row.
            reach: positions that are looked at, as many or more.
            last: the place of each row's last real token, (R,).
            gates: adapters with their rows' gates, (R,) each.
            scale: the rows' head scales, (R, D).

        Returns:
            Logits (R, V), float32.
        """
        visible = masks(at, reach, self._dtype, self.windows)
        with forward_of(self, last.unsqueeze(1), scale):
            try:
                self.linears.begin(gates)
                output = self.model(
                    input_ids=tokens,
                    attention_mask=visible if len(visible) > 1 else next(iter(visible.values())),
                    position_ids=at.masked_fill(at >= used, 0),
                    past_key_values=self.cache,
                    use_cache=True,
                )
            finally:
                self.linears.end()
        logits: Tensor = output.logits[:, -1, : self.vocabulary].float()
        return logits

    def _scales(self, rows: Sequence[Row]) -> Tensor | None:
        """The rows' head scales as (R, D), where any has one."""
        scaled = [row.head_scale for row in rows if row.head_scale is not None]
        if not scaled:
            return None
        ones = torch.ones_like(scaled[0])
        return torch.stack([ones if row.head_scale is None else row.head_scale for row in rows]).to(self.device)

    def _before_head(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Of the hidden states (R, N, D), those of the M places that are asked for in each row, scaled: (R, M, D). So
        neither padding nor the prompt's other tokens cost a head, whatever the architecture does to its logits
        afterwards.
        """
        places, scale = under_way.places, under_way.scale
        if under_way.owner is not self or places is None:
            return None
        (hidden,) = inputs
        hidden = hidden.gather(1, places.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
        if scale is not None:
            hidden = hidden * scale.unsqueeze(1).to(hidden.dtype)
        if self._head is not None:
            hidden = self._head(hidden)
        return (hidden,)


def most_positions(model: Any) -> int | None:
    """The tokens that a model has positions for, as its configuration tells; ``None`` for no such bound."""
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(declared) if declared and declared > 0 else None


def exact_positions(model: Any) -> int | None:
    """The tokens up to which a position is encoded the same whatever else is in the batch: rotary embeddings of some
    kinds (``longrope``, ``dynamic``) change for all rows once one of them goes beyond the original context.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [table for table in (rope, *rope.values()) if isinstance(table, dict)]
    changing = [table for table in tables if table.get("rope_type") in ("longrope", "dynamic")]
    original = [table.get("original_max_position_embeddings") for table in changing]
    return min((int(most or config.max_position_embeddings) for most in original), default=None)


def attention_windows(model: Any) -> dict[str, int | None]:
    """The kinds of a model's attention layers with their windows, ``None`` for attention over everything before.

    Raises:
        ModelError: a kind that a slot cache cannot hold.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(model, "_is_stateful", False) or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} does not keep its past as keys and values alone, which decoding needs; choose a decoder-only, "
            "attention-based model"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(
            f"{name} has layers that share keys and values, which cannot be kept by rows; choose a model without"
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds:
        return {"sliding_attention": int(window)} if window else {"full_attention": None}
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"{name} has layers of {', '.join(sorted(unknown))}, whose state cannot be kept by rows; choose a model "
            "with full or sliding-window attention"
        )
    return {kind: int(window) if kind == "sliding_attention" else None for kind in sorted(kinds)}  # type: ignore[arg-type]
