"""The engine's contract: token ids in, token ids out, on references that recompute everything for every token."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from prefmw.alignment import Combined, combine_linear, combine_plain, nucleus, restrict, scaled
from prefmw.decoding import Engine, Request, Sampling, View
from prefmw.errors import (
    ContextLengthError,
    EngineClosedError,
    EngineError,
    EngineOverloadedError,
    UsageError,
)
from tests.decoding.conftest import VOCABULARY

GREEDY = Sampling(temperature=0.0, top_p=0.8, top_k=None, max_tokens=24, seed=0)
LONG, SHORT = tuple(range(5, 60)), tuple(range(100, 118))


def sampling(**changes) -> Sampling:
    return Sampling(**{**vars(GREEDY), **changes})


def decode(engine, *contexts, combiner=combine_plain, sampling=GREEDY, strength=0.0, stop=()):
    views = tuple(View(context) for context in contexts)
    generation = engine.submit(Request(views, combiner, sampling, (strength,), frozenset(stop)))
    return list(generation), generation.finish_reason


@torch.inference_mode()
def last_logits(model, tokens) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[:, -1].float()


def naive_linear(model, without, with_principle, *, ratio, top_p, temperature, seed, count) -> list[int]:
    """Linear Alignment as the authors' code does it: two whole forwards for every token, no cache."""
    generator, reply = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        z0 = last_logits(model, [*without, *reply])
        z1 = last_logits(model, [*with_principle, *reply])
        logits = restrict(scaled(z0, z1, ratio), z1, nucleus(z1, top_p, temperature))
        if temperature == 0:
            reply.append(int(logits.argmax()))
        else:
            order = z1[0].sort(descending=True, stable=True).indices
            running = (logits[0] / temperature).softmax(0, dtype=torch.float64)[order].cumsum(0)
            u = torch.rand((), generator=generator, dtype=torch.float64)
            reply.append(int(order[int((running <= u).sum())]))
    return reply


def test_plain_greedy_is_what_generate_gives(model, engine):
    with torch.inference_mode():
        whole = model.generate(torch.tensor([LONG]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    tokens, reason = decode(engine, LONG)
    assert tokens == whole[0, len(LONG) :].tolist()
    assert reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("contexts", [(SHORT, LONG), (LONG, SHORT)], ids=["padded first", "padded second"])
def test_linear_alignment_is_what_two_whole_forwards_give(model, engine, contexts, ratio, temperature):
    how = sampling(temperature=temperature, seed=7)
    expected = naive_linear(model, *contexts, ratio=ratio, top_p=0.8, temperature=temperature, seed=7, count=24)
    tokens, _ = decode(engine, *contexts, combiner=combine_linear, sampling=how, strength=ratio)
    assert tokens == expected


def test_zero_ratio_in_two_views_is_preference_prompting_in_one(engine):
    how = sampling(temperature=0.9, seed=3, max_tokens=60)
    both, _ = decode(engine, SHORT, LONG, combiner=combine_linear, sampling=how, strength=0.0)
    alone, _ = decode(engine, LONG, sampling=how)
    assert both == alone


def test_a_positive_ratio_changes_the_reply(engine):
    steered, _ = decode(engine, SHORT, LONG, combiner=combine_linear, strength=4.0)
    assert steered != decode(engine, LONG)[0]


def test_the_same_seed_gives_the_same_reply_and_another_seed_another(engine):
    first, _ = decode(engine, LONG, sampling=sampling(temperature=1.0, seed=1))
    again, _ = decode(engine, LONG, sampling=sampling(temperature=1.0, seed=1))
    other, _ = decode(engine, LONG, sampling=sampling(temperature=1.0, seed=2))
    assert first == again != other


def test_global_random_state_is_left_alone(engine):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    decode(engine, LONG, sampling=sampling(temperature=1.0))
    assert torch.equal(torch.rand(3), expected)


def test_many_callers_at_once_get_what_each_gets_alone(engine):
    jobs = [(LONG[i:], SHORT[: i + 4], float(i)) for i in range(8)]
    alone = [decode(engine, a, b, combiner=combine_linear, strength=s)[0] for a, b, s in jobs]
    together = [engine.submit(Request((View(a), View(b)), combine_linear, GREEDY, (s,))) for a, b, s in jobs]
    assert [list(generation) for generation in together] == alone


def test_a_stop_token_ends_the_reply_and_is_not_part_of_it(engine):
    tokens, _ = decode(engine, LONG)
    end = tokens[5]
    stopped, reason = decode(engine, LONG, stop={end})
    assert stopped == tokens[: tokens.index(end)]
    assert reason == "stop"


def test_top_k_one_is_greedy_whatever_the_temperature(engine):
    tokens, _ = decode(engine, LONG, sampling=sampling(temperature=2.0, top_k=1))
    assert tokens == decode(engine, LONG)[0]


def test_padded_vocabulary_is_never_sampled(model):
    engine = Engine(model, capacity=256, vocabulary=20)
    tokens, _ = decode(engine, LONG, sampling=sampling(temperature=5.0, top_p=1.0, max_tokens=100))
    engine.close()
    assert max(tokens) < 20


def test_tokens_come_before_the_reply_is_done(engine):
    generation = engine.submit(Request((View(LONG),), combine_plain, sampling(max_tokens=190)))
    next(iter(generation))
    assert generation.finish_reason is None
    generation.cancel()


def test_cancelling_frees_the_engine(engine):
    with engine.submit(Request((View(LONG),), combine_plain, sampling(max_tokens=190))) as generation:
        stream = iter(generation)
        first = [next(stream) for _ in range(3)]
    rest = list(generation)
    assert generation.finish_reason == "cancelled"
    assert len(first) + len(rest) < 190
    assert decode(engine, LONG)[1] == "length"


def test_timing_covers_prefill_and_decoding(engine):
    generation = engine.submit(Request((View(LONG),), combine_plain, GREEDY))
    list(generation)
    assert generation.prefill_s > 0
    assert generation.decode_s > 0


def test_context_and_reply_beyond_the_capacity_are_refused(engine):
    with pytest.raises(ContextLengthError, match="256"):
        engine.submit(Request((View(LONG),), combine_plain, sampling(max_tokens=256 - len(LONG) + 1)))
    engine.submit(Request((View(LONG),), combine_plain, sampling(max_tokens=256 - len(LONG)))).cancel()


@pytest.mark.parametrize("views", [(), (View(()),), (View(LONG), View(()))], ids=["no view", "empty", "one empty"])
def test_requests_without_context_are_refused(engine, views):
    with pytest.raises(UsageError, match="view"):
        engine.submit(Request(views, combine_plain, GREEDY))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-40),
        ("temperature", 1e308),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("top_p", 1e-50),
        ("top_k", 0),
        ("top_k", 2.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", "a"),
        ("top_p", None),
        ("seed", 1.5),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_sampling_out_of_range_is_refused(field, value):
    with pytest.raises(UsageError, match=field.replace("_", "-")):
        sampling(**{field: value})


@contextmanager
def kept_busy(engine):
    """What is submitted within waits together: the engine decodes another request until the block ends."""
    entered, go = threading.Event(), threading.Event()

    def waits(views, parameters):
        entered.set()
        go.wait(10)
        return combine_plain(views, parameters)

    engine.submit(Request((View(SHORT),), waits, sampling(max_tokens=1)))
    assert entered.wait(10)
    yield
    go.set()


def together(engine, *requests: Request) -> list[tuple[list[int], str | None]]:
    """The replies to requests that wait together."""
    with kept_busy(engine):
        generations = [engine.submit(request) for request in requests]
    return [(list(generation), generation.finish_reason) for generation in generations]


MIXED = [
    Request((View(LONG),), combine_plain, sampling(max_tokens=3)),
    Request((View(SHORT),), combine_plain, sampling(max_tokens=24)),
    Request((View(LONG[:9]),), combine_plain, sampling(max_tokens=24, temperature=1.0, seed=5)),
    Request((View(SHORT[3:]),), combine_plain, sampling(max_tokens=11, temperature=1.0, seed=6)),
    Request((View(SHORT), View(LONG)), combine_linear, sampling(max_tokens=9, temperature=0.7, seed=7), (2.0,)),
    Request((View(LONG[:20]), View(LONG)), combine_linear, sampling(max_tokens=17), (5.0,)),
]


def test_requests_of_different_lengths_get_together_what_each_gets_alone(engine):
    alone = []
    for request in MIXED:
        generation = engine.submit(request)
        alone.append((list(generation), generation.finish_reason))
    assert together(engine, *MIXED) == alone
    assert [len(ids) for ids, _ in alone] == [3, 24, 24, 11, 9, 17]


def test_a_stop_token_ends_one_reply_and_leaves_the_others(engine):
    plain, _ = decode(engine, SHORT)
    stopping = Request((View(SHORT),), combine_plain, GREEDY, (), frozenset({plain[4]}))
    (stopped, reason), (whole, _) = together(engine, stopping, Request((View(SHORT),), combine_plain, GREEDY))
    assert (stopped, reason) == (plain[: plain.index(plain[4])], "stop")
    assert whole == plain


def test_a_combiner_that_fails_in_company_fails_its_own_request_alone(engine):
    def picky(views, parameters):
        if bool((parameters < 0).any()):
            raise ValueError("a negative parameter")
        return combine_plain(views, parameters)

    sound = Request((View(SHORT),), picky, GREEDY, (1.0,))
    failing = Request((View(LONG),), picky, GREEDY, (-1.0,))
    expected, _ = decode(engine, SHORT)
    with kept_busy(engine):
        first, second, third = (engine.submit(request) for request in (sound, failing, sound))
    assert list(first) == list(third) == expected
    with pytest.raises(EngineError, match="a negative parameter"):
        list(second)


def test_a_request_cancelled_while_it_waits_is_not_decoded(engine):
    with kept_busy(engine):
        cancelled = engine.submit(Request((View(LONG),), combine_plain, GREEDY))
        kept = engine.submit(Request((View(SHORT),), combine_plain, GREEDY))
        cancelled.cancel()
    assert (list(cancelled), cancelled.finish_reason, len(list(kept))) == ([], "cancelled", 24)


def test_an_exception_reaches_its_owner_and_nobody_else(engine):
    def broken(views, parameters):
        raise ValueError("no such thing")

    failing = engine.submit(Request((View(LONG),), broken, GREEDY))
    sound = engine.submit(Request((View(LONG),), combine_plain, GREEDY))
    with pytest.raises(EngineError, match="no such thing") as caught:
        list(failing)
    assert isinstance(caught.value.__cause__, ValueError)
    assert len(list(sound)) == 24


def test_a_combiner_that_excludes_every_candidate_falls_back_to_the_rule(engine):
    def others(views, parameters):
        likely = nucleus(views[0], 0.8)
        return Combined(torch.where(likely, -torch.inf, views[0]), views[0])

    tokens, _ = decode(engine, LONG, combiner=others)
    assert tokens == decode(engine, LONG)[0]


def held(release: threading.Event):
    """A combiner that waits, so that a test holds the worker."""

    def combiner(views, parameters):
        release.wait(timeout=30)
        return combine_plain(views, parameters)

    return combiner


def test_a_full_queue_says_so(model):
    release = threading.Event()
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY, queue_size=1)
    running = engine.submit(Request((View(LONG),), held(release), sampling(max_tokens=1)))
    while running.started_at is None:
        time.sleep(0.001)
    waiting = engine.submit(Request((View(LONG),), combine_plain, GREEDY))
    with pytest.raises(EngineOverloadedError, match="full"):
        engine.submit(Request((View(LONG),), combine_plain, GREEDY))
    release.set()
    assert len(list(waiting)) == 24
    engine.close()


def test_closing_fails_what_is_in_flight_and_what_waits(model):
    release = threading.Event()
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    running = engine.submit(Request((View(LONG),), held(release), GREEDY))
    waiting = engine.submit(Request((View(LONG),), combine_plain, GREEDY))
    threading.Timer(0.1, release.set).start()
    engine.close()
    for generation in (running, waiting):
        with pytest.raises(EngineClosedError):
            list(generation)
    with pytest.raises(EngineClosedError):
        engine.submit(Request((View(LONG),), combine_plain, GREEDY))


def naive_log_probabilities(model, context, reply) -> torch.Tensor:
    return torch.stack(
        [last_logits(model, [*context, *reply[:at]])[0].log_softmax(0)[token] for at, token in enumerate(reply)]
    )


def test_a_reply_s_log_probabilities_are_those_of_whole_forwards(model, engine):
    pairs = [(LONG, SHORT), (SHORT, LONG[:7]), (SHORT[:1], LONG[:1]), (LONG, LONG)]
    for found, (context, reply) in zip(engine.log_probabilities(pairs), pairs, strict=True):
        torch.testing.assert_close(found, naive_log_probabilities(model, context, reply), atol=1e-4, rtol=1e-4)
    assert engine.log_probabilities([]) == []


def test_replies_are_read_while_others_are_in_the_making(model, engine):
    alone = decode(engine, SHORT)
    generation = engine.submit(Request((View(SHORT),), combine_plain, GREEDY, (0.0,), frozenset()))
    (found,) = engine.log_probabilities([(LONG, SHORT)])
    assert list(generation) == alone[0]
    torch.testing.assert_close(found, naive_log_probabilities(model, LONG, SHORT), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("pair", "error"), [(((), (5,)), UsageError), (((5,), ()), UsageError)])
def test_nothing_to_read_is_refused(engine, pair, error):
    with pytest.raises(error):
        engine.log_probabilities([pair])


def test_replies_beyond_the_capacity_are_not_read(engine):
    with pytest.raises(ContextLengthError, match="256"):
        engine.log_probabilities([(range(5, 200), range(5, 100))])


def test_a_model_that_fails_to_read_says_so_and_the_engine_goes_on(model, engine, monkeypatch):
    backbone = engine._tables["base"].backbone
    with monkeypatch.context() as patch, pytest.raises(EngineError, match="too hot"):
        patch.setattr(backbone, "log_probabilities", _fail)
        engine.log_probabilities([(SHORT, SHORT)])
    assert decode(engine, SHORT)[0]


def _fail(*arguments):
    raise RuntimeError("too hot")


def test_a_closed_engine_reads_nothing(model):
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.log_probabilities([(SHORT, SHORT)])


def test_last_states_are_those_of_whole_forwards_with_a_lora_and_without(model, engine):
    from tests.decoding.test_backbone import lora
    from tests.toymodels import make_model

    texts = [LONG, SHORT, [*SHORT, *LONG]]
    adapter = lora(model)
    engine.ensure_adapter("judge", adapter)
    engine.ensure_adapter("judge", adapter)  # the one that is there stays
    merged = make_model(VOCABULARY, context=256)  # the same again
    with torch.no_grad():
        for name, (down, up) in adapter.matrices.items():
            merged.get_submodule(name).weight += up @ down
    for judge, adapter_name in ((model, None), (merged, "judge")):
        for found, text in zip(engine.last_states(texts, adapter=adapter_name), texts, strict=True):
            with torch.no_grad():
                expected = judge.base_model(torch.tensor([list(text)])).last_hidden_state[0, -1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert engine.last_states([]) == []


@pytest.mark.parametrize("text", [[], [VOCABULARY], [5]])
def test_a_text_that_cannot_be_read_is_refused(engine, text):
    with pytest.raises(UsageError):
        engine.last_states([text])
