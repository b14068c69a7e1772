"""A known reply looked into: every step is what decoding saw, and onlookers have no say."""

from __future__ import annotations

import pytest
import torch

from prefmw.alignment import combine_linear, combine_plain
from prefmw.decoding import Request, Sampling, View
from prefmw.decoding.forced import look_into
from prefmw.errors import ContextLengthError, EngineError

SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=None, max_tokens=12, seed=3)
SAID = lambda combined, views, tokens: tokens.tolist()  # noqa: E731
FIRST, SECOND = [5, 6, 7, 8], [9, 8, 7]


def said_by(backend, request):
    return list(backend.engine.submit(request))


def test_each_step_is_what_decoding_saw(backend):
    seen = []

    def watching(views, parameters):
        combined = combine_linear(views, parameters)
        seen.append(combined.logits[0].clone())
        return combined

    request = Request((View(FIRST), View(SECOND)), watching, SAMPLING, (2.0,))
    tokens = said_by(backend, request)
    ((*again,),) = look_into(
        [(Request(request.views, combine_linear, SAMPLING, (2.0,)), tokens)],
        backend.engine,
        lambda combined, views, tokens: [(tokens.item(), combined.logits[0].clone())],
    )
    assert [token for token, _ in again] == tokens
    for (_, logits), before in zip(again, seen, strict=True):
        assert torch.allclose(logits, before, atol=1e-4)


def test_an_onlooker_reads_the_reply_and_has_no_say(backend):
    request = Request((View(FIRST),), combine_plain, SAMPLING)
    tokens = said_by(backend, request)
    (seen,) = look_into(
        [(request, tokens)],
        backend.engine,
        lambda combined, views, tokens: [float(views[-1][0].log_softmax(0)[tokens[0]])],
        onlookers=(View(SECOND),),
    )
    (read,) = backend.engine.log_probabilities([(SECOND, tokens)])
    assert seen == pytest.approx(read.tolist(), abs=1e-3)


def test_many_replies_come_back_in_their_order(backend):
    request = Request((View(FIRST),), combine_plain, SAMPLING)
    replies = [(request, [5 + index % 9] * (1 + index % 4)) for index in range(150)]
    done = []
    found = look_into(replies, backend.engine, SAID, progress=done.append)
    assert found == [tokens for _, tokens in replies]
    assert done == list(range(1, 151))


def test_an_end_token_last_is_a_step(backend):
    request = Request((View(FIRST),), combine_plain, SAMPLING, stop_ids=backend.chat.stop_ids)
    end = min(backend.chat.stop_ids)
    assert look_into([(request, [7, end])], backend.engine, SAID) == [[7, end]]


def test_an_end_token_in_the_middle_is_refused(backend):
    request = Request((View(FIRST),), combine_plain, SAMPLING, stop_ids=backend.chat.stop_ids)
    with pytest.raises(EngineError, match="3 tokens was seen in 1 steps"):
        look_into([(request, [min(backend.chat.stop_ids), 7, 7])], backend.engine, SAID)


def test_a_reply_beyond_the_context_is_refused(backend):
    request = Request((View(FIRST),), combine_plain, SAMPLING)
    with pytest.raises(ContextLengthError):
        look_into([(request, [5] * backend.chat.capacity)], backend.engine, SAID)


def test_what_a_look_raises_reaches_the_caller(backend):
    request = Request((View(FIRST),), combine_plain, SAMPLING)

    def fails(combined, views, tokens):
        raise ValueError("seen enough")

    with pytest.raises(EngineError, match="seen enough"):
        look_into([(request, [5, 6])], backend.engine, fails)
