"""What nobody should hand in: refused by name where it can be told, and otherwise a failure of its owner alone."""

from __future__ import annotations

import threading

import pytest
import torch

from prefmw.alignment import Combined, combine_plain
from prefmw.decoding import Adapter, Engine, Request, View
from prefmw.decoding.sampling import random_numbers
from prefmw.errors import ContextLengthError, EngineClosedError, EngineError, ModelError, PrefmwError, UsageError
from tests.decoding.conftest import VOCABULARY
from tests.decoding.families import VOCABULARY as FEW
from tests.decoding.families import family
from tests.decoding.test_backbone import lora
from tests.decoding.test_engine import GREEDY, held, kept_busy, sampling
from tests.decoding.test_scheduling import REQUESTS, TEXT, linear, reply
from tests.toymodels import make_model

PLAIN = Request((View(TEXT[:9]),), combine_plain, GREEDY)


def first(views, parameters):
    """The first view alone; the others are read and have no say."""
    return Combined(views[0], views[0])


# What is no request.

SPARSE = torch.ones(32).to_sparse()
NAN, HUGE = float("nan"), 10**400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View(torch.tensor([5, 6])), r"a view's context is a list of token ids, got Tensor; its tolist\(\)"),
        (lambda: View(torch.tensor([5, 6]).numpy()), r"got ndarray; its tolist\(\)"),
        (lambda: View("five"), "a view's context is a list of token ids, got str"),
        (lambda: View(None), "got NoneType"),
        (lambda: View([5, 6.0, 7]), "token ids, whole numbers; got one of type float"),
        (lambda: View([5, NAN, 7]), "got one of type float"),
        (lambda: View([5, "6"]), "got one of type str"),
        (lambda: View([5], backbone=["base"]), "a view's backbone is a name, got list"),
        (lambda: View([5], adapter=[]), "a view's adapter is a name or None, got list"),
        (lambda: View([5], advance=7), "an advance rule is a function, got int"),
        (lambda: View([5], head_scale=[1.0] * 32), "a head scale is a tensor of finite floats .*, got list"),
        (lambda: View([5], head_scale=SPARSE), "got a tensor that is not dense"),
        (lambda: View([5], head_scale=torch.ones(32, device="meta")), "got a tensor on no device"),
        (lambda: View([5], head_scale=torch.ones(32, dtype=torch.long)), "got a tensor of int64"),
        (lambda: View([5], head_scale=torch.ones(2, 16)), r"got \(2, 16\)"),
        (lambda: View([5], head_scale=torch.full((32,), torch.nan)), "got NaN or infinity in it"),
        (lambda: Request(None, combine_plain, GREEDY), "a request's views are a tuple, got NoneType"),
        (lambda: Request(([5, 6],), combine_plain, GREEDY), "each view of a request is a View, got list"),
        (lambda: Request((View([5]),), "linear", GREEDY), "a combiner is a function, got str"),
        (lambda: Request((View([5]),), combine_plain, None), "a request's sampling is a Sampling, got NoneType"),
        (
            lambda: Request((View([5]),), combine_plain, GREEDY, None),
            "a request's parameters are a tuple, got NoneType",
        ),
        (lambda: Request((View([5]),), combine_plain, GREEDY, ("1",)), "a combiner's parameter is a number, got str"),
        (
            lambda: Request((View([5]),), combine_plain, GREEDY, (), None),
            "stop ids are a set of token ids, got NoneType",
        ),
        (lambda: Request((View([5]),), combine_plain, GREEDY, (), {5.0}), "stop ids are a set of token ids"),
        (lambda: Request((View([5]),), combine_plain, GREEDY, owner=["alice"]), "owner is a name or None, got list"),
        (lambda: sampling(temperature=HUGE), "temperature is 0 .*, got inf"),
        (lambda: sampling(temperature=True), "temperature is a number, got bool"),
        (lambda: sampling(top_p=-HUGE), "top-p lies in .*, got -inf"),
        (lambda: sampling(top_k=2**70), "top-k is at most 9223372036854775807, got one of 71 bits; leave it out"),
        (lambda: sampling(max_tokens=10**5000), "max-tokens is at most 9223372036854775807, got one of 16610 bits"),
        (lambda: sampling(seed=2**63), "seed is at most 9223372036854775807, got one of 64 bits"),
    ],
)
def test_what_is_no_request_is_refused_when_it_is_made(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_what_is_no_request_is_not_submitted(engine):
    with pytest.raises(UsageError, match="what is submitted is a Request, got tuple"):
        engine.submit((View([5]), combine_plain, GREEDY))


def test_a_context_that_changes_after_the_request_is_made_changes_nothing(engine):
    context = TEXT[:9]
    request = Request((View(context),), combine_plain, GREEDY)
    context[4] = NAN
    assert reply(engine, request) == reply(engine, PLAIN)


def test_the_first_view_s_vocabulary_is_what_the_others_read(engine):
    engine.add_backbone("small", make_model(200, context=256, seed=5), capacity=256, vocabulary=200)
    views = (View([5], advance=lambda token: [token]), View([5], backbone="small"))
    with pytest.raises(UsageError, match="200 and 300 tokens share no tokens"):
        engine.submit(Request(views, first, GREEDY))


# What fails while others are answered.


class Incomparable:
    """A combiner that may be called, and nothing else."""

    def __call__(self, views, parameters):
        return combine_plain(views, parameters)

    def __hash__(self):
        return 7

    def __eq__(self, other):
        raise ValueError("cannot be compared")


class Unhashable:
    __hash__ = None

    def __call__(self, views, parameters):
        return combine_plain(views, parameters)


@pytest.mark.parametrize("kind", [Incomparable, Unhashable])
def test_a_combiner_need_not_be_comparable_or_hashable(engine, kind):
    requests = [Request((View(TEXT[:9]),), kind(), GREEDY) for _ in range(2)]
    expected = reply(engine, PLAIN)
    with kept_busy(engine):
        replies = [engine.submit(request) for request in (*requests, PLAIN)]
    assert [list(one) for one in replies] == [expected] * 3


def raising(error):
    def rule(*_):
        raise error

    return rule


class Unspeakable(Exception):
    def __str__(self):
        raise KeyboardInterrupt


def nothing(rule):
    """Combined logits of -inf alone, in the rule or in what is sampled from."""

    def combiner(views, parameters):
        none = torch.full_like(views[0], -torch.inf)
        return Combined(views[0], none) if rule else Combined(none, views[0])

    return combiner


def broken_rule(advance):
    return Request((View(TEXT[:9]), View([5], advance=advance)), first, GREEDY)


def broken_combiner(combiner, how=GREEDY):
    return Request((View(TEXT[:9]),), combiner, how)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (broken_combiner(raising(SystemExit(3))), "decoding failed: SystemExit: 3"),
        (broken_combiner(raising(KeyboardInterrupt())), "decoding failed: KeyboardInterrupt"),
        (broken_combiner(raising(Unspeakable())), "Unspeakable: without a message that can be read"),
        (broken_combiner(lambda *_: None), "AttributeError"),
        (broken_combiner(lambda views, _: Combined(views[0].to_sparse(), views[0].to_sparse())), "decoding failed"),
        (broken_combiner(nothing(rule=True)), "excludes every token: its rule"),
        (broken_combiner(nothing(rule=False)), "excludes every token: its logits"),
        (broken_combiner(nothing(rule=True), sampling(temperature=0.8)), "excludes every token: its rule"),
        (broken_combiner(nothing(rule=False), sampling(temperature=0.8)), "excludes every token: its logits"),
        (broken_rule(raising(SystemExit(3))), "decoding failed: SystemExit: 3"),
        (broken_rule(raising(GeneratorExit())), "decoding failed: GeneratorExit"),
        (
            broken_rule(lambda token: [5.0, 6.0]),
            "what an advance rule gives is a list of token ids, whole numbers; got",
        ),
        (broken_rule(lambda token: [5, NAN, 6]), "got one of type float"),
        (broken_rule(lambda token: (token for _ in iter(int, 1))), "is a list of token ids, got generator"),
        (broken_rule(lambda token: None), "is a list of token ids, got NoneType"),
        (broken_rule(lambda token: [2**80]), "token ids lie in 0..299"),
    ],
)
def test_a_request_that_fails_fails_alone(engine, request_, message):
    neighbours = [PLAIN, *REQUESTS[:3]]
    expected = [reply(engine, request) for request in neighbours]
    with kept_busy(engine):
        before, bad, after = (
            [engine.submit(one) for one in neighbours],
            engine.submit(request_),
            [engine.submit(one) for one in neighbours],
        )
    with pytest.raises(PrefmwError, match=message):
        list(bad)
    assert [list(one) for one in (*before, *after)] == expected * 2
    assert reply(engine, PLAIN) == expected[0]


def test_a_combiner_that_excludes_every_token_of_a_large_vocabulary_says_so():
    with Engine(make_model(2000, context=64), capacity=64, vocabulary=2000) as engine:
        for rule in (True, False):
            with pytest.raises(EngineError, match="excludes every token"):
                reply(engine, Request((View(TEXT[:9]),), nothing(rule), sampling(max_tokens=5)))


def test_an_advance_rule_is_asked_once_a_token_even_when_memory_runs_out(model, engine):
    asked = []

    def advance(token):
        asked.append(token)
        return [token]

    single = []

    def once(module, inputs):
        single.append(inputs[0].shape[1] == 1)
        if single[-1] and sum(single) == 10:
            raise torch.OutOfMemoryError("no room")

    hook = model.get_input_embeddings().register_forward_pre_hook(once)
    said = reply(engine, Request((View(TEXT[:9]), View([5], advance=advance)), first, GREEDY))
    hook.remove()
    assert sum(single) > 10
    assert asked == said[:-1]  # the last one nobody reads
    assert said == reply(engine, PLAIN)


# Engines that cannot be.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity is at least 1, got 0"),
        ({"capacity": 2.5}, "capacity is a whole number, got float"),
        ({"capacity": 257}, "a capacity of 257 tokens exceeds the 256 positions of LlamaForCausalLM"),
        ({"vocabulary": 0}, "vocabulary is at least 1, got 0"),
        ({"vocabulary": 301}, "a vocabulary of 301 tokens exceeds the 300 of LlamaForCausalLM"),
        ({"queue_size": 0}, "queue-size is at least 1, got 0"),
        ({"max_rows": -1}, "max-rows is at least 1, got -1"),
        ({"parked_bytes": -1}, "parked-bytes is at least 0, got -1"),
    ],
)
def test_an_engine_beyond_its_model_or_of_no_size_is_refused(model, options, message):
    with pytest.raises(UsageError, match=message):
        Engine(model, **{"capacity": 256, "vocabulary": VOCABULARY, **options})
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_backbone_beyond_its_model_is_refused_and_all_its_positions_can_be_used(engine):
    with pytest.raises(UsageError, match="a capacity of 1000 tokens exceeds the 256 positions of GPT2LMHeadModel"):
        engine.add_backbone("gpt2", family("gpt2"), capacity=1000, vocabulary=FEW)
    engine.add_backbone("gpt2", family("gpt2"), capacity=256, vocabulary=FEW)
    views = (View([5] * 250, backbone="gpt2"),)
    assert len(reply(engine, Request(views, combine_plain, sampling(max_tokens=6)))) == 6
    with pytest.raises(ContextLengthError, match="256"):
        engine.submit(Request(views, combine_plain, sampling(max_tokens=7)))


# Adapters.

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (
            {LAYER: (torch.zeros(32), torch.zeros(32, 2))},
            r"gives 'model.layers.0.*q_proj' \(32,\); expected two matrices",
        ),
        ({LAYER: (torch.zeros(1, 2, 32), torch.zeros(32, 2))}, r"\(1, 2, 32\)"),
        ({LAYER: ([[0.0] * 32], torch.zeros(32, 1))}, "gives .* list; expected"),
        ({LAYER: (torch.full((2, 32), torch.nan), torch.zeros(32, 2))}, "NaN or infinity in it"),
        ({LAYER: torch.zeros(2, 32)}, "gives .* Tensor; expected two matrices"),
        ({"model.norm": (torch.zeros(2, 32), torch.zeros(32, 2))}, "'model.norm', a LlamaRMSNorm; .* linear layers"),
        (
            {"model.nowhere": (torch.zeros(2, 32), torch.zeros(32, 2))},
            "'model.nowhere', which this model does not have",
        ),
    ],
)
def test_an_adapter_that_is_none_is_refused_and_leaves_nothing(engine, matrices, message):
    with pytest.raises(ModelError, match=message):
        engine.add_adapter("one", Adapter(matrices))
    with pytest.raises(ModelError, match="no adapter 'one'"):
        engine.submit(Request((View([5], adapter="one"),), combine_plain, GREEDY))


def test_an_adapter_of_convolutions_is_told_what_can_be_changed(engine):
    engine.add_backbone("gpt2", family("gpt2"), capacity=256, vocabulary=FEW)
    adapter = Adapter({"transformer.h.0.attn.c_attn": (torch.zeros(2, 32), torch.zeros(96, 2))})
    with pytest.raises(ModelError, match=r"a Conv1D; it can change linear layers \(torch.nn.Linear\) alone"):
        engine.add_adapter("one", adapter, backbone="gpt2")


def test_an_adapter_for_no_backbone_or_without_a_name_is_refused(model, engine):
    with pytest.raises(UsageError, match="no backbone 'huge' in this engine; there is base"):
        engine.add_adapter("one", lora(model), backbone="huge")
    with pytest.raises(UsageError, match="no backbone of type list"):
        engine.add_adapter("one", lora(model), backbone=["base"])
    for name, adapter in ((None, lora(model)), ("one", {}), ("one", Adapter([]))):
        with pytest.raises(UsageError, match="an adapter is a name and an Adapter"):
            engine.add_adapter(name, adapter)


# Seeds.


def numbers(seed: int) -> list[float]:
    found = random_numbers(seed)
    return [next(found) for _ in range(4)]


def test_seeds_that_differ_in_any_bit_are_different():
    seeds = [5, *(5 ^ 1 << bit for bit in range(63)), 5 << 32, (5 << 32) + 7, (7 << 32) + 5, 2**63 - 1]
    seen = [tuple(numbers(seed)) for seed in seeds]
    assert len(set(seen)) == len(set(seeds)) == len(seeds)
    assert all(0 <= number < 1 for row in seen for number in row)


def test_a_seed_of_32_bits_is_torch_s():
    generator = torch.Generator().manual_seed(2**32 - 1)
    assert numbers(2**32 - 1) == torch.rand(4, generator=generator, dtype=torch.float64).tolist()


def test_large_seeds_draw_evenly():
    """Among 4,000 numbers a tenth's share is off by 0.025 once in a million runs; the seed is fixed besides."""
    found = random_numbers((3 << 40) + 3)
    shares = torch.histc(torch.tensor([next(found) for _ in range(4000)]), bins=10, min=0, max=1) / 4000
    assert (shares - 0.1).abs().max() < 0.025


def test_replies_of_seeds_that_differ_by_two_to_the_32_differ(engine):
    said = [reply(engine, linear(0, 9, 14, seed=seed, count=24)) for seed in (7, 7 + 2**32, 7)]
    assert said[0] == said[2] != said[1]


# The end.


@pytest.mark.parametrize("where", ["combiner", "advance rule"])
def test_an_engine_may_be_closed_by_what_it_calls(where):
    model = make_model(VOCABULARY, context=256)
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)

    def closes(*given):
        engine.close()
        return combine_plain(*given) if where == "combiner" else [5]

    closing = broken_combiner(closes) if where == "combiner" else broken_rule(closes)
    with kept_busy(engine):
        replies = [engine.submit(closing), engine.submit(PLAIN)]
    for one in replies:
        with pytest.raises(EngineClosedError):
            list(one)
    engine.close()
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_an_engine_closed_from_within_lets_go_of_its_models_by_itself():
    model = make_model(VOCABULARY, context=256)
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    generation = engine.submit(broken_combiner(lambda *given: engine.close() or combine_plain(*given)))
    with pytest.raises(EngineClosedError):
        list(generation)
    engine._worker.join(10)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_a_closed_engine_takes_no_backbone_and_no_adapter(model):
    with Engine(model, capacity=256, vocabulary=VOCABULARY) as engine:
        assert reply(engine, PLAIN)
    with pytest.raises(EngineClosedError):
        engine.add_backbone("other", make_model(VOCABULARY), capacity=256, vocabulary=VOCABULARY)
    with pytest.raises(EngineClosedError):
        engine.add_adapter("one", lora(model))
    with pytest.raises(EngineClosedError):
        engine.submit(PLAIN)


# Replies to be read.


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([5, VOCABULARY], [5]), "token ids lie in 0..299 for this model, got 300"),
        (([5], [5, VOCABULARY]), "got 300"),
        (([5], [-1]), "got -1"),
        (([5.0], [5]), "a context is a list of token ids, whole numbers; got one of type float"),
        (([5], torch.tensor([5])), "a reply is a list of token ids, got Tensor"),
    ],
)
def test_replies_of_no_tokens_of_the_model_s_are_not_read(engine, pair, message):
    with pytest.raises(UsageError, match=message):
        engine.log_probabilities([(TEXT[:5], TEXT[:3]), pair])


def test_padded_ids_may_be_read_but_not_said(model):
    with Engine(model, capacity=256, vocabulary=200) as engine:
        assert engine.log_probabilities([([250], [5])])[0].isfinite().all()
        with pytest.raises(UsageError, match="token ids lie in 0..199"):
            engine.log_probabilities([([5], [250])])


def test_a_combiner_that_has_replies_read_is_told_that_it_waits_for_itself(engine):
    def asks(views, parameters):
        engine.log_probabilities([([5], [6])])

    with pytest.raises(EngineError, match="the engine waits for the combiner"):
        reply(engine, broken_combiner(asks))
    assert reply(engine, PLAIN)


# Who reads a reply.


def test_a_second_reader_is_told_so_and_the_first_gets_all(model):
    release = threading.Event()
    with Engine(model, capacity=256, vocabulary=VOCABULARY) as engine:
        generation = engine.submit(broken_combiner(held(release)))
        said: list[int] = []
        reader = threading.Thread(target=lambda: said.extend(generation))
        reader.start()
        while not generation._read.locked():
            pass
        with pytest.raises(UsageError, match="being read by another thread"):
            next(iter(generation))
        release.set()
        reader.join(30)
        assert said == reply(engine, PLAIN)
        assert list(generation) == []


def test_a_reply_may_be_handed_from_thread_to_thread(engine):
    generation, said = engine.submit(PLAIN), []
    stream = iter(generation)
    while generation.finish_reason is None:
        reader = threading.Thread(
            target=lambda: said.extend(token for token in [next(stream, None)] if token is not None)
        )
        reader.start()
        reader.join(30)
    assert said == reply(engine, PLAIN)
