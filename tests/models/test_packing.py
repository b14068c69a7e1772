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
    quick = packed(encoder)
    assert sum(isinstance(module, Packed) for module in quick.modules()) == 2 * 6 + 1  # the pooler's as well
    with torch.inference_mode():
        expected, found = encoder(**TOKENS).last_hidden_state, quick(**TOKENS).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_encoder_stays_as_it_was_and_shares_its_other_weights(encoder):
    quick = packed(encoder)
    assert not any(isinstance(module, Packed) for module in encoder.modules())
    assert quick.embeddings.word_embeddings.weight is encoder.embeddings.word_embeddings.weight
    encoder(**TOKENS).last_hidden_state.sum().backward()
    assert encoder.encoder.layer[0].output.dense.weight.grad is not None


def test_without_packed_products_it_is_the_encoder_itself(encoder, monkeypatch):
    monkeypatch.setattr(packing, "can_pack", lambda dtype: False)
    assert packed(encoder) is encoder


def test_a_layer_tells_the_type_of_its_weights():
    if packing.can_pack(torch.float32):
        assert Packed(nn.Linear(64, 64)).weight.dtype == torch.float32
