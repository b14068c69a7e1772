"""What one request, one moment without memory or one fault does to the others: nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from prefmw.alignment import Combined, combine_linear, combine_pad, combine_plain
from prefmw.decoding import Adapter, Engine, Request, View
from prefmw.decoding.backbone import exact_positions
from prefmw.decoding.slots import _SlotLayer
from prefmw.errors import ContextLengthError, EngineError, EngineOverloadedError, ModelError, UsageError
from tests.decoding.conftest import VOCABULARY
from tests.decoding.families import VOCABULARY as FEW
from tests.decoding.families import family
from tests.decoding.test_backbone import lora
from tests.decoding.test_engine import GREEDY, held, kept_busy, sampling
from tests.decoding.test_scheduling import REQUESTS, TEXT, Counter, linear, reply, turns
from tests.toymodels import make_model

PLAIN = Request((View(TEXT[:9]),), combine_plain, GREEDY)


# Requests that are refused before anybody shares a forward with them.


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View([5, VOCABULARY]), "token ids lie in 0..299 for this model, got 300"),
        (View([-1]), "got -1"),
        (View([5], head_scale=torch.ones(3)), r"the shape \(32,\) of hidden states, got \(3,\)"),
    ],
)
def test_what_the_model_cannot_read_is_refused(engine, view, message):
    with pytest.raises(UsageError, match=message):
        engine.submit(Request((view,), combine_plain, GREEDY))


def test_an_unknown_adapter_is_refused(engine):
    with pytest.raises(ModelError, match="no adapter 'x' on this model; there is none"):
        engine.submit(Request((View([5], adapter="x"),), combine_plain, GREEDY))


def test_a_second_adapter_of_the_same_name_is_refused(model, engine):
    engine.add_adapter("one", lora(model))
    with pytest.raises(ModelError, match="there is an adapter 'one'"):
        engine.add_adapter("one", lora(model, seed=1))


def test_each_backbone_has_a_capacity_of_its_own(engine):
    engine.add_backbone("small", make_model(200, context=64, seed=5), capacity=64, vocabulary=200)
    views = (View(TEXT[:9]), View([3] * 50, backbone="small", advance=lambda token: [token % 200]))
    with pytest.raises(ContextLengthError, match="context of 64"):
        engine.submit(Request(views, combine_plain, GREEDY))


# Rules of a request's own that fail while it is decoded.


@pytest.mark.parametrize(
    ("advance", "message"),
    [
        (lambda token: 1 // 0, "ZeroDivisionError"),
        (lambda token: [VOCABULARY], "token ids lie in 0..299"),
        (lambda token: [7] * 100, "exceed the model's context of 256"),
    ],
)
def test_an_advance_rule_that_fails_fails_its_own_request_alone(engine, advance, message):
    def first_alone(views, parameters):
        return Combined(views[0], views[0])

    with kept_busy(engine):
        sound = engine.submit(PLAIN)
        broken = engine.submit(Request((View(TEXT[:9]), View([5], advance=advance)), first_alone, GREEDY))
    with pytest.raises((EngineError, UsageError, ContextLengthError), match=message):
        list(broken)
    assert list(sound) == reply(engine, PLAIN)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_rule_that_is_no_distribution_reaches_its_owner_alone(engine, value):
    def bent(views, parameters):
        rule = views[0].clone()
        rule[:, 3] = torch.where(parameters[:, 0] < 0, value, rule[:, 3])
        return Combined(views[0], rule)

    with kept_busy(engine):
        sound = engine.submit(Request((View(TEXT[:9]),), bent, GREEDY, (1.0,)))
        broken = engine.submit(Request((View(TEXT[:9]),), bent, GREEDY, (-1.0,)))
    assert list(sound) == reply(engine, PLAIN)
    with pytest.raises(EngineError, match="NaN or infinity"):
        list(broken)


def test_numbers_that_overflowed_in_a_row_do_not_reach_the_next_one_in_it():
    model = make_model(VOCABULARY, context=256)
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    expected = reply(engine, Request((View(TEXT[:5]),), combine_plain, GREEDY))
    poison = next(token for token in range(VOCABULARY) if token not in [*TEXT[:5], *expected])
    model.get_input_embeddings().weight.data[poison] = torch.nan
    with pytest.raises(EngineError, match="NaN"):
        reply(engine, Request((View([*TEXT[:60], poison]),), combine_plain, GREEDY))
    assert reply(engine, Request((View(TEXT[:5]),), combine_plain, GREEDY)) == expected
    engine.close()


# Memory that is not there.


def test_an_out_of_memory_while_the_cache_grows_costs_nobody_a_token(model, engine, monkeypatch):
    expected = [reply(engine, request) for request in REQUESTS]
    engine.close()
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    grow, calls = _SlotLayer.grow, []

    def short_of_memory(layer, rows, positions):
        calls.append(layer)
        if len(calls) == 2:  # the second layer, when the first has grown
            raise torch.OutOfMemoryError("no room")
        grow(layer, rows, positions)

    monkeypatch.setattr(_SlotLayer, "grow", short_of_memory)
    replies = [engine.submit(request) for request in REQUESTS]
    assert [list(one) for one in replies] == expected
    assert len(calls) > 3
    engine.close()


def test_rows_come_back_after_an_out_of_memory(model, monkeypatch):
    from prefmw.decoding import scheduler

    monkeypatch.setattr(scheduler, "PATIENCE", 10)
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    failed = []

    def once(module, inputs):
        if inputs[0].shape[0] > 8 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")

    hook = model.get_input_embeddings().register_forward_pre_hook(once)
    with Counter(model) as counter:
        first = [engine.submit(linear(at, 9, 14, seed=at, count=60)) for at in range(8)]
        more = [engine.submit(linear(at, 9, 14, seed=at, count=20)) for at in range(8)]
        assert [len(list(one)) for one in (*first, *more)] == [60] * 8 + [20] * 8
    assert failed
    rows = [rows for rows, _ in counter.shapes]
    assert max(rows[rows.index(max(rows)) + 1 :]) > 8
    hook.remove()
    engine.close()


def test_a_reply_that_cannot_be_parked_still_ends(model, engine, monkeypatch):
    backbone = engine._tables["base"].backbone
    monkeypatch.setattr(backbone, "copy_of", lambda row, on_cpu: (_ for _ in ()).throw(RuntimeError("lost")))
    assert len(reply(engine, turns(linear(0, 9, 14, count=5), []))) == 5
    monkeypatch.undo()
    assert reply(engine, PLAIN)


# Waiting.


def test_who_was_cancelled_in_a_full_queue_makes_room(model):
    release = threading.Event()
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY, queue_size=1)
    running = engine.submit(Request((View(TEXT[:9]),), held(release), sampling(max_tokens=1)))
    while running.started_at is None:
        pass
    gone = engine.submit(PLAIN)
    with pytest.raises(EngineOverloadedError):
        engine.submit(PLAIN)
    gone.cancel()
    kept = engine.submit(PLAIN)
    assert (list(gone), gone.finish_reason) == ([], "cancelled")
    release.set()
    assert len(list(kept)) == 24
    engine.close()


# What is kept.


def test_nothing_is_parked_of_who_was_forgotten_while_they_were_answered(engine):
    generation = engine.submit(turns(linear(0, 9, 14, count=30), []))
    next(iter(generation))
    engine.forget("alice")
    list(generation)
    reply(engine, PLAIN)
    assert engine._parking.bytes == 0


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_next_turn_is_the_same_parked_or_not_where_windows_slide(name, on_cpu):
    engine = Engine(family(name), capacity=256, vocabulary=FEW, park_on_cpu=on_cpu)
    text = [token % (FEW - 3) + 3 for token in TEXT]
    first = Request((View(text[:70]), View(text[3:90])), combine_linear, sampling(max_tokens=9), (2.0,), owner="alice")
    following = turns(first, reply(engine, first), 7, 8, 9)
    warm = reply(engine, following)
    engine.forget()
    assert reply(engine, following) == warm
    engine.close()


def test_one_reading_that_is_large_does_not_drive_out_its_fellow_view(model):
    states = 2 * 2 * 16 * 100 * 4 * 2  # both views of 100 tokens, nearly
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY, parked_bytes=states)
    reply(engine, turns(linear(0, 100, 120, count=5), []))
    assert engine._parking.bytes > 0
    engine.close()


# Methods that read with an adapter.


def naive_pad(model, policy, scale, context, *, beta, count) -> list[int]:
    """Greedy PAD by whole forwards of two models."""
    said = []
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.tensor([[*context, *said]])
            base = model(ids).logits[0, -1].log_softmax(0)
            hidden = policy.model(ids).last_hidden_state[:, -1] * scale
            steered = policy.lm_head(hidden)[0].log_softmax(0)
            likely = base.topk(10).indices
            score = base + beta * (steered - base)
            said.append(int(likely[score[likely].argmax()]))
    return said


def test_pad_through_the_engine_is_what_two_models_give(model):
    policy = make_model(VOCABULARY, context=256)
    adapter = lora(policy)
    for layer, (down, up) in adapter.matrices.items():
        policy.get_submodule(layer).weight.data += up @ down
    scale = torch.linspace(0.5, 1.5, 32)
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    engine.add_adapter("persrm", Adapter(adapter.matrices))
    request = Request(
        (View(TEXT[:20]), View(TEXT[:20], adapter="persrm", head_scale=scale)),
        combine_pad,
        sampling(top_p=1.0, top_k=10),
        (1.5,),
    )
    with kept_busy(engine):
        alone, crowd = engine.submit(request), [engine.submit(one) for one in REQUESTS]
    assert list(alone) == naive_pad(model, policy, scale, TEXT[:20], beta=1.5, count=24)
    assert all(list(one) for one in crowd)
    engine.close()


# Models that others use as well.


def test_two_engines_on_one_model_do_not_disturb_each_other(model, engine):
    expected = [reply(engine, request) for request in REQUESTS]
    other = Engine(model, capacity=256, vocabulary=VOCABULARY)
    other.add_adapter("one", lora(model))
    both = [(engine.submit(request), other.submit(request)) for request in REQUESTS]
    with torch.inference_mode():
        whole = model(torch.tensor([TEXT[:30]])).logits
    assert whole.shape[1] == 30  # no hook of theirs cuts a forward that is not theirs
    assert [(list(one), list(two)) for one, two in both] == [(said, said) for said in expected]
    engine.close()
    with_adapter = Request((View(TEXT[:9], adapter="one"),), combine_plain, GREEDY)
    assert reply(other, with_adapter) != reply(other, PLAIN)
    other.close()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("first", [0, 1])
def test_engines_on_one_model_leave_nothing_in_whatever_order_they_close(model, monkeypatch, first):
    monkeypatch.setattr("prefmw.decoding.products.quickest_ways", lambda layers, pack: ("plain", "turned", "turned"))
    engines = [Engine(model, capacity=256, vocabulary=VOCABULARY) for _ in range(2)]
    assert reply(engines[0], PLAIN) == reply(engines[1], PLAIN)
    engines[first].close()
    assert reply(engines[1 - first], PLAIN)
    engines[1 - first].close()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_stood_there_before_is_kept(model):
    layer = model.lm_head
    calls = []

    def before(x):
        calls.append(x.shape)
        return torch.nn.functional.linear(x, layer.weight)

    layer.forward = before
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    engine.add_adapter("head", Adapter({"lm_head": (torch.zeros(2, 32), torch.zeros(VOCABULARY, 2))}))
    assert reply(engine, PLAIN)
    assert calls
    engine.close()
    assert layer.forward is before
    del layer.forward


def test_positions_that_change_with_the_longest_row_bound_the_context():
    model = family("phi3")
    assert exact_positions(model) is None
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert exact_positions(model) == 64
    engine = Engine(model, capacity=256, vocabulary=FEW)
    with pytest.raises(ContextLengthError, match="context of 64"):
        engine.submit(Request((View([5] * 50),), combine_plain, GREEDY))
    engine.close()


def test_a_program_that_leaves_an_engine_open_ends_as_it_should():
    script = """
from prefmw.alignment import combine_plain
from prefmw.decoding import Engine, Request, Sampling, View
from tests.decoding.families import family
engine = Engine(family("llama"), capacity=200, vocabulary=160)
sampling = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_tokens=190, seed=0)
next(iter(engine.submit(Request((View([3, 4]),), combine_plain, sampling))))
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
