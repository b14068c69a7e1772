"""The papers' mathematics as pure functions on tensors: no models, no devices moved, no global random state."""

from prefmw.alignment.candidates import nucleus, restrict, top_k
from prefmw.alignment.combiners import Combined, Combiner, combine_linear, combine_plain
from prefmw.alignment.linear import normalized, scaled

__all__ = [
    "Combined",
    "Combiner",
    "combine_linear",
    "combine_plain",
    "normalized",
    "nucleus",
    "restrict",
    "scaled",
    "top_k",
]
