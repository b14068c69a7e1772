"""An encoder for inference alone, its linear layers reading packed weights (:mod:`prefmw.decoding.products`): a short
text's few tokens take as long as the weights take to read.
"""

from __future__ import annotations

from torch import Tensor, nn

from prefmw.decoding.products import can_pack, pack, packed_product


class Packed(nn.Module):
    """A linear layer with a packed copy of its weights, taken as they are now."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = pack(layer.weight.detach())  # by this name, since an encoder may look at its type
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, given: Tensor) -> Tensor:
        """(..., columns) to (..., rows)."""
        return packed_product(given, self.weight, self.bias)


def packed(encoder: nn.Module) -> nn.Module:
    """A frozen encoder, its linear layers replaced in place by ones that read packed weights; left alone where this
    machine has no such products for it.
    """
    layers = [(name, layer) for name, layer in encoder.named_modules() if type(layer) is nn.Linear]
    if all(layer.weight.device.type == "cpu" and can_pack(layer.weight.dtype) for _, layer in layers):
        for name, layer in layers:
            parent, _, own = name.rpartition(".")
            setattr(encoder.get_submodule(parent), own, Packed(layer))
    return encoder
