"""Rows of a slot cache against a whole forward of each row alone, on every family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefmw.decoding.backbone import Backbone, Row
from prefmw.decoding.graphs import StepGraphs
from prefmw.decoding.linears import Adapter
from prefmw.decoding.selfcheck import self_check
from prefmw.errors import ModelError
from tests.decoding.families import FAMILIES, VOCABULARY, family


@torch.inference_mode()
def whole(model, tokens) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0, -1].float()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_any_length_read_what_each_reads_alone(name):
    model, reference = family(name), family(name)
    backbone = Backbone(model, vocabulary=VOCABULARY)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (40, 7, 25)]
    rows = [Row(slot, list(text)) for slot, text in zip((0, 1, 3), texts, strict=True)]
    backbone.forward(rows, [18, 5, 18])
    backbone.forward(rows[:2], [22, 2])
    backbone.forward(rows[2:], [7])
    for row, text in zip(rows, texts, strict=True):
        torch.testing.assert_close(row.logits, whole(reference, text), atol=2e-4, rtol=2e-4)
    backbone.cache.swap(2, 3, 40)
    rows[2].slot = 2
    for step in range(6):
        for row, text in zip(rows, texts, strict=True):
            token = int(row.logits.argmax())
            text.append(token)
            row.pending.append(token)
        backbone.forward(rows, [1, 1, 1])
        for row, text in zip(rows, texts, strict=True):
            torch.testing.assert_close(row.logits, whole(reference, text), atol=2e-4, rtol=2e-4, msg=f"step {step}")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_the_one_token_step_on_fixed_shapes_gives_what_free_shapes_give(name):
    """What a CUDA graph records, run without one: more rows and positions than there are."""
    texts = [list(range(5, 5 + length)) for length in (30, 9, 17)]
    logits = []
    for fixed in (False, True):
        backbone = Backbone(family(name), vocabulary=VOCABULARY)
        backbone.graphs = StepGraphs(backbone) if fixed else None
        rows = [Row(slot, list(text)) for slot, text in enumerate(texts)]
        waiting = Row(3, list(range(40, 60)))  # reads its prompt in the slot that only rounds up
        backbone.forward(rows, [30, 9, 17])
        backbone.forward([waiting], [12])
        for token in (7, 8, 9):
            for row in rows:
                row.pending.append(token)
            backbone.forward(rows, [1, 1, 1])
        backbone.forward([waiting], [8])
        logits.append([row.logits for row in (*rows, waiting)])
    for free, fixed_logits in zip(*logits, strict=True):
        torch.testing.assert_close(free, fixed_logits, atol=1e-4, rtol=1e-4)


def lora(model, rank: int = 3, seed: int = 0, layers=("q_proj", "down_proj")) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: (
                torch.randn(rank, module.in_features, generator=generator) * 0.3,
                torch.randn(module.out_features, rank, generator=generator) * 0.3,
            )
            for name, module in model.named_modules()
            if name.endswith(layers)
        }
    )


def test_rows_with_and_without_adapters_share_a_forward():
    backbone = Backbone(family("llama"), vocabulary=VOCABULARY)
    adapters = {name: lora(backbone.model, seed=seed) for seed, name in enumerate(("persrm", "dpa"))}
    for name, adapter in adapters.items():
        backbone.linears.add(name, adapter)
    text = list(range(5, 20))
    rows = [Row(slot, list(text), adapter=name) for slot, name in enumerate((None, "persrm", "dpa", "persrm"))]
    backbone.forward(rows, [15] * 4)
    for row in rows:
        reference = family("llama")
        if row.adapter is not None:
            for layer, (down, up) in adapters[row.adapter].matrices.items():
                reference.get_submodule(layer).weight.data += up @ down
        torch.testing.assert_close(row.logits, whole(reference, text), atol=2e-4, rtol=2e-4)
    assert not torch.allclose(rows[0].logits, rows[1].logits, atol=0.1)
    with pytest.raises(ModelError, match="no adapter 'other' on this model; there is persrm, dpa"):
        backbone.forward([Row(0, [3], adapter="other")], [1])


def test_adapters_that_do_not_fit_are_refused_by_layer():
    backbone = Backbone(family("llama"), vocabulary=VOCABULARY)
    with pytest.raises(ModelError, match="changes 'model.nowhere'"):
        backbone.linears.add("x", Adapter({"model.nowhere": (torch.zeros(2, 32), torch.zeros(32, 2))}))
    with pytest.raises(ModelError, match=r"does not fit 'model.layers.0.self_attn.q_proj' \(32 x 32\)"):
        backbone.linears.add(
            "x", Adapter({"model.layers.0.self_attn.q_proj": (torch.zeros(2, 16), torch.zeros(32, 2))})
        )


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_head_scale_weights_the_last_hidden_state_of_its_row(name):
    backbone, reference = Backbone(family(name), vocabulary=VOCABULARY), family(name)
    scale = torch.linspace(0.5, 1.5, 32)
    text = list(range(5, 20))
    rows = [Row(0, list(text)), Row(1, list(text[3:]), head_scale=scale)]
    backbone.forward(rows, [15, 12])
    torch.testing.assert_close(rows[0].logits, whole(reference, text), atol=2e-4, rtol=2e-4)
    head = reference.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * scale,))
    torch.testing.assert_close(rows[1].logits, whole(reference, text[3:]), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_self_check_passes_every_family(name):
    self_check(Backbone(family(name), vocabulary=VOCABULARY), capacity=256)


def test_the_self_check_sees_a_window_that_nobody_told_of():
    backbone = Backbone(family("mistral"), vocabulary=VOCABULARY)
    backbone.windows = {"full_attention": None}
    with pytest.raises(ModelError, match="MistralForCausalLM gives other logits in rows than by itself"):
        self_check(backbone, capacity=256)


def test_the_self_check_refuses_by_name_what_builds_its_own_positions():
    config = AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    backbone = Backbone(AutoModelForCausalLM.from_config(config).eval().float(), vocabulary=VOCABULARY)
    with pytest.raises(ModelError, match="BloomForCausalLM"):
        self_check(backbone, capacity=256)


@pytest.mark.parametrize("kind", ["mamba", "qwen3_next", "t5"])
def test_models_whose_past_is_no_keys_and_values_are_refused_by_name(kind):
    config = AutoConfig.for_model(kind)
    model = torch.nn.Linear(2, 2)
    model.config, model.dtype = config, torch.float32
    model.get_input_embeddings = lambda: torch.nn.Embedding(4, 2)
    model._is_stateful = kind == "mamba"
    with pytest.raises(ModelError, match="choose a"):
        Backbone(model, vocabulary=4)
