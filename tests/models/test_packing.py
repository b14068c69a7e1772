"""Encoders that read packed weights: the same numbers, the original as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from prefmw.models import packing
from prefmw.models.packing import Packed, packed


@pytest.fixture
def encoder() -> BertModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=50, **shape)).eval()


TOKENS = {
    "input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
}


def test_a_packed_encoder_gives_the_same_states(encoder):
    if not packing.can_pack(torch.float32):
        pytest.skip("this build of torch has no packed products")
    with torch.inference_mode():
        expected = encoder(**TOKENS).last_hidden_state
        quick = packed(encoder)
        found = quick(**TOKENS).last_hidden_state
    assert sum(isinstance(module, Packed) for module in quick.modules()) == 2 * 6 + 1  # the pooler's as well
    assert torch.allclose(found, expected, atol=1e-5)


def test_without_packed_products_it_is_left_alone(encoder, monkeypatch):
    monkeypatch.setattr(packing, "can_pack", lambda dtype: False)
    assert not any(isinstance(module, Packed) for module in packed(encoder).modules())


def test_a_layer_tells_the_type_of_its_weights():
    if packing.can_pack(torch.float32):
        assert Packed(nn.Linear(64, 64)).weight.dtype == torch.float32
