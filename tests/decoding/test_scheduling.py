"""Many requests on one engine: joining, leaving, resuming and failing change nobody else's tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefmw.alignment import Combined, combine_linear, combine_plain
from prefmw.decoding import Engine, Request, Sampling, View, scheduler
from prefmw.decoding.slots import _SlotLayer
from prefmw.errors import EngineError, UsageError
from tests.decoding.conftest import VOCABULARY
from tests.decoding.test_engine import GREEDY, naive_linear, sampling
from tests.toymodels import make_model

TEXT = torch.randint(3, VOCABULARY, (400,), generator=torch.Generator().manual_seed(3)).tolist()


def reply(engine, request: Request) -> list[int]:
    return list(engine.submit(request))


def linear(at: int, short: int, long: int, *, ratio=2.0, seed=0, count=12, temperature=0.8) -> Request:
    views = (View(TEXT[at : at + short]), View(TEXT[at + 3 : at + 3 + long]))
    return Request(views, combine_linear, sampling(max_tokens=count, temperature=temperature, seed=seed), (ratio,))


REQUESTS = [
    linear(at, short, long, ratio=ratio, seed=at, count=count, temperature=temperature)
    for at, short, long, ratio, count, temperature in (
        (0, 4, 30, 2.0, 12, 0.8),
        (11, 25, 9, 0.5, 3, 0.0),
        (23, 60, 61, 5.0, 20, 0.8),
        (40, 1, 1, 1.0, 9, 1.3),
        (57, 13, 90, 3.0, 6, 0.8),
        (80, 33, 34, 0.0, 15, 0.0),
        (99, 7, 120, 10.0, 11, 0.8),
        (140, 17, 2, 2.0, 18, 0.8),
    )
]


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    """Every request's reply by two whole forwards a token."""
    return [
        naive_linear(
            model,
            *(list(view.context) for view in request.views),
            ratio=request.parameters[0],
            top_p=0.8,
            temperature=request.sampling.temperature,
            seed=request.sampling.seed,
            count=request.sampling.max_tokens,
        )
        for request in REQUESTS
    ]


SCHEDULES = st.lists(
    st.tuples(st.integers(0, 25), st.integers(0, len(REQUESTS) - 1), st.one_of(st.none(), st.integers(1, 10))),
    min_size=1,
    max_size=16,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=SCHEDULES, chunk=st.sampled_from([5, 40, 256]))
def test_replies_are_the_same_whoever_joins_and_leaves(engine, expected, schedule, chunk):
    """``schedule``: after how many tokens of a first reply who joins, and after how many of their own they cancel."""
    scheduler.CHUNK["cpu"] = chunk
    joined, steps = [], itertools.count()

    def conduct(views, parameters):
        now = next(steps)
        joined.extend((engine.submit(REQUESTS[which]), which, leaves) for at, which, leaves in schedule if at == now)
        return combine_plain(views, parameters)

    reply(engine, Request((View(TEXT[:9]),), conduct, sampling(max_tokens=26)))
    scheduler.CHUNK["cpu"] = 256
    assert len(joined) == len(schedule)
    for generation, which, leaves in joined:
        if leaves is None:
            assert list(generation) == expected[which]
        else:
            said = list(itertools.islice(generation, leaves))
            generation.cancel()
            assert said == expected[which][: len(said)]


class Counter:
    """Counts the tokens that a model reads, padding among them."""

    def __init__(self, model) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._hook = model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module, inputs) -> None:
        self.shapes.append(tuple(inputs[0].shape))

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def test_all_views_of_all_users_are_rows_of_one_forward_a_step(model, engine):
    requests = [linear(at, 9, 14, seed=at, count=30) for at in range(8)]
    with Counter(model) as counter:
        replies = [engine.submit(request) for request in requests]
        for one in replies:
            list(one)
    decoding = [rows for rows, width in counter.shapes if width == 1]
    assert max(decoding) == 16
    assert len(decoding) < 30 + 8


def test_a_long_prompt_is_read_in_chunks_between_the_tokens_of_others(model, engine, monkeypatch):
    monkeypatch.setitem(scheduler.CHUNK, "cpu", 20)
    order: list[tuple[int, int]] = []

    def joins(views, parameters):
        if not order:
            late.append(engine.submit(Request((View(TEXT[:200]),), combine_plain, sampling(max_tokens=2))))
        order.append(views[0].shape)
        return combine_plain(views, parameters)

    late: list = []
    with Counter(model) as counter:
        first = reply(engine, Request((View(TEXT[:5]),), joins, sampling(max_tokens=40)))
        list(late[0])
    assert len(first) == 40
    widths = [width for _, width in counter.shapes]
    assert max(widths) <= 20
    last_chunk = max(index for index, width in enumerate(widths) if width == 20)
    assert widths[:last_chunk].count(1) >= 8  # the first reply went on in between


def test_a_prompt_that_no_reply_waits_for_is_read_in_larger_chunks(model, engine, monkeypatch):
    monkeypatch.setattr(scheduler, "CHUNK", {"cpu": 20})
    monkeypatch.setattr(scheduler, "CHUNK_ALONE", {"cpu": 50})
    with Counter(model) as counter:
        reply(engine, Request((View(TEXT[:200]),), combine_plain, sampling(max_tokens=2)))
    assert [width for _, width in counter.shapes] == [50] * 4 + [1]


def test_a_prompt_that_is_read_in_chunks_has_its_room_made_once(model, monkeypatch):
    grown, grow = [], _SlotLayer.grow
    monkeypatch.setattr(
        _SlotLayer, "grow", lambda layer, *size: grown.append(layer.is_initialized) or grow(layer, *size)
    )
    monkeypatch.setattr(scheduler, "CHUNK_ALONE", {"cpu": 20})
    with Engine(model, capacity=256, vocabulary=VOCABULARY) as engine:
        reply(engine, Request((View(TEXT[:200]),), combine_plain, sampling(max_tokens=3)))
    assert grown == [False, False]  # both layers, before anything lay in them


def test_a_short_prompt_does_not_wait_behind_a_long_one(engine, monkeypatch):
    monkeypatch.setitem(scheduler.CHUNK_ALONE, "cpu", 10)
    long = engine.submit(Request((View(TEXT[:230]),), combine_plain, sampling(max_tokens=2)))
    short = engine.submit(Request((View(TEXT[:6]),), combine_plain, sampling(max_tokens=2)))
    list(long), list(short)
    assert short.first_token_at < long.first_token_at


def test_requests_beyond_the_rows_wait_their_turn(model):
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY, max_rows=4)
    with Counter(model) as counter:
        replies = [engine.submit(linear(at, 9, 14, seed=at, count=5)) for at in range(6)]
        assert [len(list(one)) for one in replies] == [5] * 6
    assert max(rows for rows, _ in counter.shapes) <= 4
    with pytest.raises(UsageError, match="up to 4 views, got 5"):
        engine.submit(Request((View(TEXT[:4]),) * 5, combine_plain, GREEDY))
    engine.close()


# Parked conversations.


def turns(request: Request, said: list[int], *more: int, owner="alice") -> Request:
    views = tuple(View([*view.context, *said, *more]) for view in request.views)
    return Request(views, request.combiner, request.sampling, request.parameters, owner=owner)


def test_the_next_turn_reads_only_what_is_new_and_says_the_same(model, engine):
    first = turns(linear(0, 80, 120, count=10), [])
    said = reply(engine, first)
    following = turns(first, said, 7, 8, 9)
    with Counter(model) as counter:
        warm = reply(engine, following)
    read = sum(rows * width for rows, width in counter.shapes if width > 1)
    assert read == 2 * 4  # the last token said, which nobody had read yet, and the three new ones, in two views
    engine.forget("alice")
    with Counter(model) as counter:
        assert reply(engine, following) == warm
    assert sum(rows * width for rows, width in counter.shapes if width > 1) > 200


def test_a_changed_principle_costs_only_the_view_that_carries_it(model, engine):
    first = turns(linear(0, 80, 120, count=10), [])
    said = reply(engine, first)
    following = turns(first, said, 7)
    changed = [5, *following.views[1].context[1:]]
    request = Request((following.views[0], View(changed)), combine_linear, GREEDY, (2.0,), owner="alice")
    with Counter(model) as counter:
        warm = reply(engine, request)
    assert [shape for shape in counter.shapes if shape[1] > 1] in ([(1, 131), (1, 2)], [(1, 2), (1, 131)])
    engine.forget()
    assert reply(engine, request) == warm


def test_conversations_are_kept_apart_and_within_the_budget(model):
    states = 2 * 100 * 2 * 256 * 4  # far more than the budget below
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY, parked_bytes=states // 4)
    for name in "abcdefgh":
        reply(engine, turns(linear(ord(name) - 90, 30, 40), [], owner=name))
        assert 0 < engine._parking.bytes <= states // 4
    with Counter(model) as counter:
        reply(engine, turns(linear(ord("a") - 90, 30, 40), [], owner="a"))  # long gone
        reply(engine, turns(linear(ord("a") - 90, 30, 40), [], owner="other"))
    assert sum(rows * width for rows, width in counter.shapes if width > 1) >= 2 * 70
    engine.close()


# What differs from row to row.


def test_views_may_read_tokens_of_their_own(model, engine):
    seen = []

    def second_alone(views, parameters):
        seen.append(views[1].clone())
        return Combined(views[0], views[0])

    request = Request(
        (View(TEXT[:9]), View(TEXT[20:25], advance=lambda token: (token, 7) if token % 2 else ())),
        second_alone,
        sampling(max_tokens=12),
    )
    said = reply(engine, request)
    assert said == reply(engine, Request((View(TEXT[:9]),), combine_plain, sampling(max_tokens=12)))
    context = list(TEXT[20:25])
    for token, logits in zip([None, *said], seen, strict=False):
        context += [] if token is None else [token, 7] if token % 2 else []
        with torch.inference_mode():
            expected = model(torch.tensor([context])).logits[:, -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


# When things go wrong.


def test_nan_from_a_combiner_reaches_its_owner_alone(engine):
    def picky(views, parameters):
        return Combined(views[0] + (parameters * torch.nan).nan_to_num(nan=0.0, posinf=0.0), views[0])

    def nan(views, parameters):
        logits = torch.where(parameters < 0, torch.nan, views[0])
        return Combined(logits, views[0])

    sound = [engine.submit(Request((View(TEXT[:9]),), nan, GREEDY, (1.0,))) for _ in range(2)]
    broken = engine.submit(Request((View(TEXT[:9]),), nan, GREEDY, (-1.0,)))
    assert list(sound[0]) == list(sound[1]) == reply(engine, Request((View(TEXT[:9]),), combine_plain, GREEDY))
    with pytest.raises(EngineError, match="NaN"):
        list(broken)


def test_a_combiner_of_another_shape_is_named(engine):
    def short(views, parameters):
        return Combined(views[0][:, :5], views[0])

    with pytest.raises(EngineError, match=r"\(1, 5\) and \(1, 300\); expected \(1, 300\) twice"):
        reply(engine, Request((View(TEXT[:9]),), short, GREEDY))


def out_of_memory_beyond(model, rows: int):
    def check(module, inputs):
        if inputs[0].shape[0] > rows:
            raise torch.OutOfMemoryError("no room")

    return model.get_input_embeddings().register_forward_pre_hook(check)


def test_out_of_memory_splits_the_batch_and_nobody_loses_a_token(model, engine, expected):
    hook = out_of_memory_beyond(model, 5)
    try:
        replies = [engine.submit(request) for request in REQUESTS]
        assert [list(one) for one in replies] == expected
    finally:
        hook.remove()


def test_a_request_that_cannot_fit_alone_fails_with_its_sizes(model, engine):
    hook = out_of_memory_beyond(model, 1)
    try:
        large, small = engine.submit(linear(0, 9, 30)), engine.submit(Request((View(TEXT[:9]),), combine_plain, GREEDY))
        assert len(list(small)) == 24
        with pytest.raises(EngineError, match=r"one request of 2 views \(\d+, \d+ tokens\)"):
            list(large)
    finally:
        hook.remove()


def test_a_crash_fails_what_was_under_way_with_its_cause_and_the_engine_goes_on(model, engine):
    def crash(module, inputs):
        raise RuntimeError("a kernel failed")

    hook = model.get_input_embeddings().register_forward_pre_hook(crash)
    failing = engine.submit(REQUESTS[0])
    with pytest.raises(EngineError, match="a kernel failed"):
        list(failing)
    hook.remove()
    assert len(reply(engine, Request((View(TEXT[:9]),), combine_plain, GREEDY))) == 24


def test_views_of_unequal_vocabularies_need_an_advance_rule(model):
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    engine.add_backbone("small", make_model(200, context=256, seed=5), capacity=256, vocabulary=200)
    views = (View(TEXT[:9]), View([3, 4], backbone="small"))
    with pytest.raises(UsageError, match="200 and 300 tokens"):
        engine.submit(Request(views, combine_plain, GREEDY))
    with pytest.raises(UsageError, match="no backbone 'huge'"):
        engine.submit(Request((View([3], backbone="huge"),), combine_plain, GREEDY))
    widths = []

    def both(views, parameters):
        widths.append([view.shape[1] for view in views])
        return Combined(views[0], views[0])

    views = (View(TEXT[:9]), View([3, 4], backbone="small", advance=lambda token: [token % 200]))
    assert reply(engine, Request(views, both, GREEDY)) == reply(
        engine, Request((View(TEXT[:9]),), combine_plain, GREEDY)
    )
    assert widths[0] == [300, 200]
    engine.close()


def test_nothing_is_left_in_the_model_when_the_engine_is_closed():
    model = make_model(VOCABULARY, context=256)
    engine = Engine(model, capacity=256, vocabulary=VOCABULARY)
    reply(engine, REQUESTS[0])
    engine.close()
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_samplings_are_checked_before_anything_runs():
    with pytest.raises(UsageError):
        Sampling(temperature=0.5, top_p=2.0, top_k=None, max_tokens=1, seed=0)
