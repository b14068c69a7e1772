"""The papers' mathematics as pure functions on tensors: no models, no devices moved, no global random state."""

from prefmw.alignment.candidates import nucleus, ranked_nucleus, redistributed, restrict, top_k
from prefmw.alignment.combiners import (
    Combined,
    CombinePadAcross,
    Combiner,
    combine_drift,
    combine_linear,
    combine_pad,
    combine_pad_by,
    combine_plain,
)
from prefmw.alignment.drift import dials
from prefmw.alignment.linear import normalized, scaled
from prefmw.alignment.pad import guided, guided_across, guided_by

__all__ = [
    "CombinePadAcross",
    "Combined",
    "Combiner",
    "combine_drift",
    "combine_linear",
    "combine_pad",
    "combine_pad_by",
    "combine_plain",
    "dials",
    "guided",
    "guided_across",
    "guided_by",
    "normalized",
    "nucleus",
    "ranked_nucleus",
    "redistributed",
    "restrict",
    "scaled",
    "top_k",
]
