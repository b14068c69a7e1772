"""Does a slot cache give what the model gives by itself? Asked once per architecture and version of transformers."""

from __future__ import annotations

import torch

from prefmw.decoding.backbone import Backbone, Row
from prefmw.errors import ModelError

TOLERANCE = {torch.float32: 0.01}
"""Largest difference of a logit allowed, in standard deviations of the logits; in narrower types :data:`NARROW`."""

NARROW = 0.35
"""Likewise for bfloat16 and float16: what other orders of summation make of them, well below what a wrong mask does."""

LONGEST = 320
"""Tokens of the longer row that is tried: beyond many a window, and far beyond the shorter row."""


@torch.inference_mode()
def self_check(backbone: Backbone, *, capacity: int) -> None:
    """Read two rows of random tokens in chunks and by single tokens, park one and exchange them on the way, and compare
    with whole forwards of either.

    Raises:
        ModelError: they differ, so the architecture does something that positions and masks do not tell it.
    """
    model, name = backbone.model, type(backbone.model).__name__
    long = max(2, min(capacity - 1, LONGEST))
    generator = torch.Generator().manual_seed(0)
    lengths = (long, max(2, long // 20))
    texts = [torch.randint(0, backbone.vocabulary, (length,), generator=generator) for length in lengths]
    rows = [Row(slot, text.tolist()) for slot, text in enumerate(texts)]
    half = [len(text) // 2 for text in texts]
    try:
        backbone.forward(rows, half)
        states = backbone.copy_of(rows[1])
        backbone.cache.swap(0, 1, max(half))
        rows[0].slot, rows[1].slot = 1, 0
        backbone.cache.put(rows[1].slot, states, half[1])
        backbone.forward(rows, [len(text) - done - 1 for text, done in zip(texts, half, strict=True)])
        backbone.forward(rows, [1, 1])
        whole = [model(input_ids=text.unsqueeze(0).to(backbone.device)).logits[0, -1].float() for text in texts]
    except Exception as error:
        raise ModelError(
            f"{name} cannot be decoded in rows: {type(error).__name__}: {' '.join(str(error).split())[:200]}; choose a "
            "decoder-only, attention-based model"
        ) from error
    for row, expected in zip(rows, whole, strict=True):
        expected = expected[: backbone.vocabulary]
        assert row.logits is not None
        apart = float((row.logits - expected).abs().max() / expected.std().clamp_min(1e-6))
        if not apart <= TOLERANCE.get(model.dtype, NARROW):
            raise ModelError(
                f"{name} gives other logits in rows than by itself ({apart:.3g} standard deviations apart), so it is "
                "not used; choose another model, or float32 if its numbers overflow"
            )
