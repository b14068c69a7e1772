"""One request in the making: what it has said, what its views have in front of the next token, and its rows.

Shapes: B requests, K views each, V vocabulary, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefmw.decoding.backbone import Row
from prefmw.decoding.generation import FinishReason, Generation
from prefmw.decoding.request import Request
from prefmw.decoding.sampling import Bounds, draw, random_numbers
from prefmw.errors import EngineError


class Active:
    """A request from its submission to its end.

    Attributes:
        contexts: what stands in front of the next token in each view: its context, and what it read of the reply.
        rows: the views', in their order; none while it waits.
        kind: requests of one kind are combined together.
        reason: why it ended, where it ended well.
        failed: whether it ended otherwise.
        alone: whether it ran out of memory once, with nobody beside it.
        epoch: of the parking, when it was submitted.
    """

    def __init__(self, request: Request, epoch: int) -> None:
        self.request = request
        self.generation = Generation()
        self.contexts = [list(view.context) for view in request.views]
        self.rows: list[Row] = []
        # By identity: what a combiner's own comparison says, or whether it has one, is nothing to rely on.
        backbones = tuple(view.backbone for view in request.views)
        self.kind = (id(request.combiner), backbones, len(request.parameters))
        self.reason: FinishReason | None = None
        self.failed = False
        self.alone = False
        self.epoch = epoch
        self._count = 0
        self._numbers = random_numbers(request.sampling.seed)
        self._uniform: float | None = None
        self._ended = False

    @property
    def done(self) -> bool:
        """Whether it has come to an end, a good one or a bad one."""
        return self.failed or self.reason is not None

    def begin(self) -> bool:
        """Whether there is anything to do."""
        if self.generation.started_at is None:
            self.generation._start()
        if self.generation.cancelled:
            self.reason = "cancelled"
        return not self.done

    def end(self) -> None:
        """Tell the caller that no more tokens come, where that is so and was not told."""
        if self.reason is not None and not self._ended:
            self._ended = True
            self.generation._finish(self.reason)

    def fail(self, error: BaseException) -> None:
        """Raise ``error`` to the caller."""
        if not self.done:
            self.failed = True
            self.generation._fail(error)

    def logits(self, index: int) -> Tensor:
        """After what one view has read, (V,)."""
        logits = self.rows[index].logits
        assert logits is not None
        return logits

    def uniform(self) -> float:
        """This step's random number, in [0, 1)."""
        if self._uniform is None:
            self._uniform = next(self._numbers)
        return self._uniform

    def say(self, token: int) -> bool:
        """Say ``token``, unless that ends the reply; whether its views have to read it."""
        self._uniform = None
        if self.generation.cancelled:
            self.reason = "cancelled"
            return False
        self.generation._drew()
        if token in self.request.stop_ids:
            self.reason, self.generation.stop_id = "stop", token
            return False
        self._count += 1
        self.generation._emit(token)
        if self._count == self.request.sampling.max_tokens:
            self.reason = "length"
        return self.reason is None

    def read(self, index: int, tokens: Sequence[int]) -> None:
        """Have one view read ``tokens`` next."""
        self.contexts[index] += tokens
        self.rows[index].pending += tokens


@torch.inference_mode()
def next_tokens(group: Sequence[Active]) -> list[int]:
    """The next token of each of B requests of one kind.

    Raises:
        EngineError: what the combiner gave cannot be sampled from.
        Exception: whatever the combiner raises.
    """
    requests = [active.request for active in group]
    views = [torch.stack([active.logits(index) for active in group]) for index in range(len(requests[0].views))]
    parameters = torch.tensor([request.parameters for request in requests], dtype=torch.float32)
    combined = requests[0].combiner(views, parameters.to(views[0].device))
    shape = (len(group), views[0].shape[1])
    if not combined.logits.shape == combined.rule.shape == shape:
        got = f"{tuple(combined.logits.shape)} and {tuple(combined.rule.shape)}"
        raise EngineError(f"the combiner gave logits of shapes {got}; expected {shape} twice")
    bounds = Bounds.of([request.sampling for request in requests])
    return draw(combined, bounds, torch.tensor([active.uniform() for active in group], dtype=torch.float64))
