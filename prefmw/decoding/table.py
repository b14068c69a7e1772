"""The rows of one backbone, and what a view must be like to have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prefmw.decoding.backbone import Backbone, Row, most_positions
from prefmw.decoding.linears import Adapter
from prefmw.decoding.request import View
from prefmw.decoding.values import token_ids, whole, wrong_matrix
from prefmw.errors import ContextLengthError, ModelError, UsageError


class Table:
    """A backbone's rows in the order of its slots: first those that reply, then those that read their prompts, so that
    a step's forward reads neighbouring slots in place.

    Args:
        model: a transformers causal language model, in evaluation mode, on its device.
        capacity: tokens that one row may hold.
        vocabulary: columns of the logits that are real tokens.
        pack: whether weights may be copied, to be read more quickly.
        head: what the last hidden states go through before the output embeddings, if anything.

    Raises:
        ModelError: a model whose past cannot be kept in rows.
        UsageError: more tokens than the model has positions for, or a vocabulary that it does not have.
    """

    def __init__(
        self, model: Any, *, capacity: int, vocabulary: int, pack: bool, head: nn.Module | None = None
    ) -> None:
        most = most_positions(model)
        if whole("capacity", capacity, least=1) > (most or capacity):
            raise UsageError(f"a capacity of {capacity} tokens exceeds the {most} positions of {type(model).__name__}")
        self.backbone = Backbone(model, vocabulary=vocabulary, pack=pack, head=head)
        self.capacity = min(capacity, self.backbone.exact or capacity)
        self._rows: list[Row] = []
        self._ready = 0

    # What fits.

    def check_view(self, view: View, max_tokens: int) -> None:
        """Raise for a view that cannot have a row, or whose reply of up to ``max_tokens`` cannot.

        Raises:
            UsageError: no context, tokens that the model does not have, or a head scale of another size.
            ModelError: an unknown adapter.
            ContextLengthError: they exceed the capacity.
        """
        self.backbone.linears.check(view.adapter)
        self.check_tokens(view.context)
        width = (self.backbone.width,)
        if view.head_scale is not None and view.head_scale.shape != width:
            got = tuple(view.head_scale.shape)
            raise UsageError(f"a head scale has the shape {width} of hidden states, got {got}")
        if len(view.context) + max_tokens > self.capacity:
            raise ContextLengthError(
                f"a prompt of {len(view.context)} tokens and a reply of up to {max_tokens} exceed the model's context "
                f"of {self.capacity}; shorten the conversation or lower max-tokens"
            )

    def check_tokens(self, tokens: Sequence[int], below: int | None = None) -> None:
        """Raise UsageError for a token id that the model does not have, or that is not ``below``."""
        below = self.backbone.read if below is None else below
        if tokens and not 0 <= min(tokens) <= max(tokens) < below:
            wrong = next(token for token in tokens if not 0 <= token < below)
            raise UsageError(f"token ids lie in 0..{below - 1} for this model, got {wrong}")

    def own_tokens(self, view: View, token: int, after: int) -> list[int]:
        """What a view with ``after`` tokens in front of it reads for ``token``: that, or what its own rule says.

        Raises:
            UsageError: a rule that gives no token ids, or such as the model does not have.
            ContextLengthError: they exceed the capacity.
            BaseException: whatever the rule raises.
        """
        if view.advance is None:
            return [token]
        own = token_ids("what an advance rule gives", view.advance(token))
        self.check_tokens(own)
        if after + len(own) > self.capacity:
            raise ContextLengthError(f"a view's own tokens exceed the model's context of {self.capacity}")
        return own

    def check_pair(self, context: Sequence[int], reply: Sequence[int]) -> None:
        """Raise for a reply that cannot be read in its context.

        Raises:
            UsageError: one is empty, or has tokens that the model does not have.
            ContextLengthError: they exceed the capacity together.
        """
        if not context or not reply:
            raise UsageError("a reply to be read needs a token of its own and one in front of it")
        self.check_tokens(context)
        self.check_tokens(reply, self.backbone.vocabulary)
        if len(context) + len(reply) > self.capacity:
            count = len(context) + len(reply)
            raise ContextLengthError(f"{count} tokens exceed the model's context of {self.capacity}")

    def add_adapter(self, name: object, adapter: object) -> None:
        """Make an adapter known under a name.

        Raises:
            UsageError: no name, or no adapter.
            ModelError: there is one by that name, or it does not fit the model.
        """
        if not isinstance(name, str) or not isinstance(adapter, Adapter) or not isinstance(adapter.matrices, Mapping):
            got = f"{type(name).__name__} and {type(adapter).__name__}"
            raise UsageError(f"an adapter is a name and an Adapter of matrices by layer, got {got}")
        modules = dict(self.backbone.model.named_modules())
        for layer, matrices in adapter.matrices.items():
            kind = type(modules.get(layer))
            if layer in modules and kind is not nn.Linear:
                raise ModelError(
                    f"the adapter '{name}' changes '{layer}', a {kind.__name__}; it can change linear layers "
                    "(torch.nn.Linear) alone"
                )
            if (wrong := _no_pair(matrices)) is not None:
                raise ModelError(
                    f"the adapter '{name}' gives '{layer}' {wrong}; expected two matrices of finite floats, "
                    "A (r, in) and B (out, r)"
                )
        self.backbone.linears.add(name, adapter)

    # Rows.

    def open(self, view: View, length: int, rows: list[Row]) -> Row:
        """A new row behind all others for a view with ``length`` tokens in front of what it reads next, added to a
        reply's ``rows``.
        """
        self.backbone.reserve(len(self._rows) + 1, length)
        scale: Tensor | None = view.head_scale
        if scale is not None:
            scale = scale.detach().to(self.backbone.device).float()
        row = Row(len(self._rows), [], adapter=view.adapter, head_scale=scale)
        self._rows.append(row)
        rows.append(row)
        return row

    def make_ready(self, row: Row) -> None:
        """Count a row among those that reply."""
        self._swap(row.slot, self._ready)
        self._ready += 1

    def ready(self) -> list[Row]:
        """The rows that reply, in the order of their slots."""
        return self._rows[: self._ready]

    def close(self, row: Row, *, wipe: bool) -> None:
        """Take a row out; its slot is free again. ``wipe`` where its states may not be finite."""
        if wipe:
            self.backbone.cache.wipe(row.slot)
        if row.slot < self._ready:
            self._ready -= 1
            self._swap(row.slot, self._ready)
        self._swap(row.slot, len(self._rows) - 1)
        self._rows.pop()

    def drop(self) -> None:
        """No rows, and the cache freed."""
        self._rows, self._ready = [], 0
        self.backbone.drop()

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        rows = self._rows
        self.backbone.cache.swap(one, other, max(len(rows[one].cached), len(rows[other].cached)))
        rows[one].slot, rows[other].slot = other, one
        rows[one], rows[other] = rows[other], rows[one]


def _no_pair(matrices: object) -> str | None:
    """What is given in place of a pair of matrices; ``None`` if it is one."""
    if not isinstance(matrices, tuple | list) or len(matrices) != 2:
        return type(matrices).__name__
    return next((wrong for one in matrices if (wrong := wrong_matrix(one, (None, None))) is not None), None)
