"""What makes decoding quick on a CPU changes none of its numbers, and nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefmw.alignment import Combined, nucleus
from prefmw.decoding import attention, products
from prefmw.decoding.backbone import Backbone, Row
from prefmw.decoding.products import FEW, pack, packed_product, turned_product
from prefmw.decoding.sampling import LIKELY, Bounds, _candidates, draw
from prefmw.decoding.threads import dismiss_helpers
from tests.decoding.families import VOCABULARY, family
from tests.decoding.test_backbone import lora, whole
from tests.decoding.test_scheduling import REQUESTS, Counter, reply

NARROW = {"atol": 0.1, "rtol": 0.05}  # bfloat16 of logits up to 3, summed in another order


packs = pytest.mark.skipif(not products.can_pack(torch.float32), reason="no packed products on this machine")


def force(monkeypatch, way):
    monkeypatch.setattr(products, "quickest_ways", lambda layers, pack: (way,) * (FEW[-1] + 1))


@packs
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_few_rows_is_the_same_every_way(rows, bias):
    x, layer = torch.randn(rows, 1, 32), torch.nn.Linear(32, 48, bias=bias)
    with torch.inference_mode():
        expected = layer(x)
        for product in (
            turned_product(x, layer.weight, layer.bias),
            packed_product(x, pack(layer.weight), layer.bias),
        ):
            torch.testing.assert_close(product, expected)
            assert product.is_contiguous()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])  # without and with biases, with a tied head
@pytest.mark.parametrize("way", ["turned", pytest.param("packed", marks=packs)])
def test_a_model_gives_the_same_logits_every_way(monkeypatch, name, way):
    force(monkeypatch, way)
    backbone, reference = Backbone(family(name), vocabulary=VOCABULARY), family(name)
    texts = [list(range(5, 25)), list(range(30, 41))]
    rows = [Row(slot, list(text)) for slot, text in enumerate(texts)]
    backbone.forward(rows, [19, 10])
    backbone.forward(rows, [1, 1])
    for row, text in zip(rows, texts, strict=True):
        torch.testing.assert_close(row.logits, whole(reference, text), atol=2e-4, rtol=2e-4)


@packs
@pytest.mark.parametrize("plentiful", [True, False], ids=["packed with the weights", "added"])
@pytest.mark.parametrize("readers", [(1,), (0, 1), (0, 2), (0, 1, 3)], ids=["one", "first", "every other", "uneven"])
def test_adapters_act_on_packed_products_too(monkeypatch, readers, plentiful):
    force(monkeypatch, "packed")
    backbone, plain, changed = Backbone(family("llama"), vocabulary=VOCABULARY), family("llama"), family("llama")
    adapter = lora(backbone.model, layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    if not plentiful:
        monkeypatch.setattr(products, "free_memory", lambda: 1000)
    packed = backbone.linears.packed_bytes()
    backbone.linears.add("all", adapter)
    assert (backbone.linears.packed_bytes() > packed) == plentiful
    for layer, (down, up) in adapter.matrices.items():
        changed.get_submodule(layer).weight.data += up @ down
    texts = [list(range(5 + number, 20 + number)) for number in range(4)]
    rows = [Row(slot, list(text), adapter="all" if slot in readers else None) for slot, text in enumerate(texts)]
    backbone.forward(rows, [13] * 4)
    backbone.forward(rows, [2] * 4)
    for row, text in zip(rows, texts, strict=True):
        model = changed if row.adapter else plain
        torch.testing.assert_close(row.logits, whole(model, text), atol=5e-4, rtol=5e-4)


@packs
def test_adapters_of_two_kinds_share_a_forward_on_packed_products(monkeypatch):
    force(monkeypatch, "packed")
    model, text = family("llama"), list(range(5, 20))
    backbone = Backbone(model, vocabulary=VOCABULARY)
    adapters = {name: lora(model, seed=seed) for seed, name in enumerate(("one", "other"))}
    for name, adapter in adapters.items():
        backbone.linears.add(name, adapter)
    rows = [Row(slot, list(text), adapter=name) for slot, name in enumerate((None, *adapters))]
    backbone.forward(rows, [14] * 3)
    backbone.forward(rows, [1] * 3)
    for row in rows:
        reference = family("llama")
        for layer, (down, up) in adapters[row.adapter].matrices.items() if row.adapter else ():
            reference.get_submodule(layer).weight.data += up @ down
        torch.testing.assert_close(row.logits, whole(reference, text), atol=5e-4, rtol=5e-4)


@packs
def test_packed_weights_are_shared_by_engines_and_go_with_the_last(monkeypatch):
    force(monkeypatch, "packed")
    model, text = family("llama"), list(range(5, 20))
    first, second = Backbone(model, vocabulary=VOCABULARY), Backbone(model, vocabulary=VOCABULARY)
    assert all(first.linears._packed[name] is packed for name, packed in second.linears._packed.items())
    assert first.linears.packed_bytes() > 0
    first.release()
    assert model.lm_head in products._packs
    second.release()
    assert model.lm_head not in products._packs
    model.lm_head.weight.data *= 2.0  # what was trained since
    third = Backbone(model, vocabulary=VOCABULARY)
    row = Row(0, list(text))
    third.forward([row], [14])
    third.forward([row], [1])
    torch.testing.assert_close(row.logits, whole(model, text), atol=4e-4, rtol=4e-4)


@pytest.mark.parametrize("free", [1000, 1 << 40])
def test_weights_are_packed_where_memory_is_plentiful(monkeypatch, free):
    tried = []
    monkeypatch.setattr(products, "free_memory", lambda: free)
    monkeypatch.setattr(products, "can_pack", lambda dtype: True)
    monkeypatch.setattr(products, "_quickest", lambda ways, *rest: tried.append(ways) or ("plain",) * len(FEW))
    for allowed in (True, False):
        assert len(products.quickest_ways([torch.nn.Linear(64, 64)], allowed)) == FEW[-1] + 1
    assert tried == [("plain", "turned", "packed") if free > 1000 else ("plain", "turned"), ("plain", "turned")]


def test_an_adapter_may_change_the_head_and_prompts_of_any_length_are_read_with_it():
    backbone, reference = Backbone(family("llama"), vocabulary=VOCABULARY), family("llama")
    adapter = lora(backbone.model, layers=("q_proj", "lm_head"))
    backbone.linears.add("head", adapter)
    for layer, (down, up) in adapter.matrices.items():
        reference.get_submodule(layer).weight.data += up @ down
    rows = [Row(0, list(range(5, 20)), adapter="head"), Row(1, list(range(5, 20)))]
    backbone.forward(rows, [15, 15])
    torch.testing.assert_close(rows[0].logits, whole(reference, list(range(5, 20))), atol=4e-4, rtol=4e-4)


def test_each_engine_on_a_model_reads_its_own_adapters(monkeypatch):
    force(monkeypatch, "turned")
    model = family("llama")
    engines = [Backbone(model, vocabulary=VOCABULARY) for _ in range(2)]
    logits = []
    for seed, backbone in enumerate(engines):
        backbone.linears.add("mine", lora(model, seed=seed))
    for backbone in engines:
        row = Row(0, list(range(5, 20)), adapter="mine")
        backbone.forward([row], [15])
        logits.append(row.logits)
    for seed in range(2):
        reference = family("llama")
        for layer, (down, up) in lora(reference, seed=seed).matrices.items():
            reference.get_submodule(layer).weight.data += up @ down
        torch.testing.assert_close(logits[seed], whole(reference, list(range(5, 20))), atol=2e-4, rtol=2e-4)
    engines[0].release()
    engines[1].release()


@pytest.mark.parametrize("growth", [0, 900], ids=["keys side by side", "keys apart"])
def test_single_tokens_in_bfloat16_see_what_whole_forwards_see(monkeypatch, growth):
    model = family("gpt_neox").bfloat16()
    seen = []
    apart = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention,
        "sdpa_attention_forward",
        lambda m, q, *rest, **more: seen.append(q.shape[2]) or apart(m, q, *rest, **more),
    )
    backbone = Backbone(model, vocabulary=VOCABULARY)
    assert model.config._attn_implementation == attention.OURS
    backbone.reserve(2, 128 + growth)
    texts = [list(range(5, 90)), list(range(30, 41))]
    rows = [Row(slot, list(text)) for slot, text in enumerate(texts)]
    backbone.forward(rows, [84, 10])
    seen.clear()
    backbone.forward(rows, [1, 1])
    assert seen == ([2] * 3 if growth else [])  # layers whose queries are asked twice
    for row, text in zip(rows, texts, strict=True):
        torch.testing.assert_close(row.logits, whole(model, text), **NARROW)


@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.bfloat16), ("gpt_neox", torch.float16), ("gpt2", None)])
def test_other_models_keep_their_attention(name, dtype):
    model = family(name) if dtype is None else family(name).to(dtype)
    Backbone(model, vocabulary=VOCABULARY)
    assert model.config._attn_implementation == "sdpa"


def test_the_attention_that_a_model_had_comes_back_with_the_last_engine():
    model = family("gpt_neox").bfloat16()
    plain = whole(model, range(5, 20))
    first, second = Backbone(model, vocabulary=VOCABULARY), Backbone(model, vocabulary=VOCABULARY)
    first.release()
    assert model.config._attn_implementation == "prefmw_single"
    second.release()
    second.release()  # twice is once
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(whole(model, range(5, 20)), plain)


def test_whoever_uses_the_model_beside_an_engine_gets_its_own_numbers_to_the_bit(monkeypatch):
    force(monkeypatch, "packed" if products.can_pack(torch.bfloat16) else "turned")
    model = family("gpt_neox").bfloat16()
    ids = torch.tensor([list(range(5, 20))])
    with torch.inference_mode():
        past = model(ids[:, :-1], use_cache=True).past_key_values
        alone = model(ids, use_cache=False).logits, model(ids[:, -1:], past_key_values=past).logits
        backbone = Backbone(model, vocabulary=VOCABULARY)
        past = model(ids[:, :-1], use_cache=True).past_key_values
        beside = model(ids, use_cache=False).logits, model(ids[:, -1:], past_key_values=past).logits
    backbone.release()
    assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))


@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([0.05, 1.0, 6.0, 40.0]),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([0.2, 0.8, 0.99, 1.0]),
    st.sampled_from([0, 1, 300]),
    st.booleans(),
)
def test_wide_nuclei_are_those_of_a_whole_ranking(seed, spread, temperature, top_p, top_k, ties):
    logits = torch.randn(2 * LIKELY, generator=torch.Generator().manual_seed(seed)) * spread
    if ties:
        logits = logits.round()
    keep = _candidates(logits, *map(torch.tensor, (temperature, top_p, top_k)))
    expected = nucleus(logits[None], top_p, temperature)[0]
    if top_k:
        expected[logits.sort(descending=True, stable=True).indices[top_k:]] = False
    if torch.equal(keep, expected):
        return
    (token,) = (keep != expected).nonzero().flatten().tolist()  # where the mass before it is top_p to the last digit
    heated = (logits / (temperature or 1.0)).double()
    assert heated.softmax(0)[heated > heated[token]].sum() == pytest.approx(top_p, abs=1e-5)


@pytest.mark.parametrize("excluded", [0, 2 * LIKELY - 9])
def test_rows_without_bounds_are_drawn_alike_alone_and_beside_bounded_ones(excluded):
    """Together they are drawn at once, unless one has few candidates; beside a bounded row each by itself."""
    rows, numbers = 12, torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(rows, 2 * LIKELY, generator=numbers)
    logits[0, :excluded] = -torch.inf
    uniforms = torch.rand(rows, generator=numbers, dtype=torch.float64)
    heat, mass = torch.tensor([0.0, 0.7, 1.0] * 4), torch.ones(rows, dtype=torch.float64)
    bounds = Bounds(heat, mass, torch.zeros(rows, dtype=torch.long))
    mixed = bounds._replace(top_k=torch.tensor([0] * (rows - 1) + [7]))
    together = draw(Combined(logits, logits), bounds, uniforms)
    assert together[:-1] == draw(Combined(logits, logits), mixed, uniforms)[:-1]
    alone = [
        draw(
            Combined(logits[at : at + 1], logits[at : at + 1]),
            Bounds(*(b[at : at + 1] for b in bounds)),
            uniforms[at : at + 1],
        )
        for at in range(rows)
    ]
    assert together == [token for (token,) in alone]
    running = (logits[2] - logits[2].max()).double().exp().cumsum(0)  # of row 2, whose temperature is 1
    assert together[2] == int((running <= uniforms[2] * running[-1]).sum())


def test_a_thread_may_let_its_helpers_go_at_any_time():
    def compute(seen):
        for _ in range(3):
            dismiss_helpers()
            seen.append(float((torch.ones(400, 400) @ torch.ones(400, 400)).sum()))

    seen: list[float] = []
    threads = [threading.Thread(target=compute, args=(seen,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    compute(seen)
    for thread in threads:
        thread.join()
    assert seen == [400.0**3] * 15


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads as Linux tells them")
def test_an_engine_computes_with_one_set_of_helpers():
    """Those of the thread that loaded the model go when the engine begins, and its own when it rests."""
    program = """
import os, time, torch
torch.set_num_threads(3)
from tests.decoding.test_scheduling import REQUESTS
from tests.toymodels import make_model
from prefmw.decoding import Engine
count = lambda: len(os.listdir("/proc/self/task"))
torch.ones(900, 900) @ torch.ones(900, 900)
model = make_model(300, context=256)
loaded = count()
engine = Engine(model, capacity=256, vocabulary=300)
list(engine.submit(REQUESTS[0]))
for _ in range(100):
    if count() < loaded:
        break
    time.sleep(0.05)
print(loaded, count())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    loaded, resting = map(int, result.stdout.split())
    assert resting <= loaded - 1  # two helpers gone, a worker come


def test_a_turn_is_taken_up_again_after_a_crash(model, engine):
    request = REQUESTS[0].__class__(**{**vars(REQUESTS[0]), "owner": "alice"})
    said = reply(engine, request)
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(Exception, match="division"):
        reply(engine, request)
    hook.remove()
    with Counter(model) as counter:
        assert reply(engine, request) == said
    assert max(width for _, width in counter.shapes) == 1  # what was parked is laid back


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this machine")
def test_a_forked_child_decodes_though_its_parent_had_helpers():
    program = """
import os, torch
torch.set_num_threads(3)
from tests.decoding.test_scheduling import REQUESTS
from tests.toymodels import make_model
from prefmw.decoding import Engine
model = make_model(300, context=256)
engine = Engine(model, capacity=256, vocabulary=300)
torch.ones(900, 900) @ torch.ones(900, 900)
child = os.fork()
if not child:
    os._exit(0 if len(list(engine.submit(REQUESTS[0]))) == 12 else 1)
print(os.waitpid(child, 0)[1])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.split()) == (0, ["0"]), result.stderr
