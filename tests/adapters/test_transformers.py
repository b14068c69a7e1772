"""Linear Alignment through transformers' own generate."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from prefmw.adapters.generate_options import HONOURED, NEUTRAL, SAMPLED, UNCONCERNED, check_options
from prefmw.adapters.transformers import linear_alignment
from prefmw.errors import ContextLengthError, UsageError
from tests.decoding.conftest import VOCABULARY
from tests.decoding.test_engine import naive_linear
from tests.toymodels import make_model

WITHOUT, WITH = list(range(5, 25)), list(range(40, 72))


@pytest.fixture(scope="module")
def model():
    return make_model(VOCABULARY, context=256)


def padded(*rows: list[int]) -> dict[str, torch.Tensor]:
    """As a tokenizer gives them: padded on the left, with a mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, plain, steered, **options) -> torch.Tensor:
    return model.generate(
        **plain,
        custom_generate=linear_alignment,
        principle_input_ids=steered["input_ids"],
        principle_attention_mask=steered["attention_mask"],
        **{"pad_token_id": 0, **options},
    )


def test_greedy_replies_are_those_of_two_whole_forwards(model):
    plain, steered = padded(WITHOUT, WITHOUT[:7]), padded(WITH, WITH[3:])
    result = generate(model, plain, steered, ratio=2.0, max_new_tokens=12, do_sample=False)
    assert torch.equal(result[:, : len(WITHOUT)], plain["input_ids"])
    for row, (without, with_principle) in enumerate([(WITHOUT, WITH), (WITHOUT[:7], WITH[3:])]):
        expected = naive_linear(model, without, with_principle, ratio=2.0, top_p=0.8, temperature=0, seed=0, count=12)
        assert result[row, len(WITHOUT) :].tolist() == expected


def test_sampling_follows_the_global_seed_as_generate_does(model):
    plain, steered = padded(WITHOUT), padded(WITH)
    replies = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        replies.append(generate(model, plain, steered, max_new_tokens=20, do_sample=True, temperature=1.2))
    assert torch.equal(replies[0], replies[1])
    assert not torch.equal(replies[0], replies[2])


def test_an_end_token_ends_a_reply_and_the_rest_is_padding(model):
    plain, steered = padded(WITHOUT, WITHOUT[:7]), padded(WITH, WITH[3:])
    whole = generate(model, plain, steered, max_new_tokens=12, do_sample=False)[:, len(WITHOUT) :].tolist()
    end = whole[0][4]
    first = whole[0].index(end) + 1
    ended = generate(model, plain, steered, max_new_tokens=12, do_sample=False, eos_token_id=end)
    row = ended[0, len(WITHOUT) :].tolist()
    assert row == whole[0][:first] + [0] * (len(row) - first)


class Listening(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.heard, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.heard.append(value)

    def end(self):
        self.ended += 1


def test_a_streamer_hears_what_generate_would_tell_it(model):
    """Prompts first, then every step's tokens as (B,), padding for replies that have ended, then the end, once."""
    plain, steered = padded(WITHOUT, WITHOUT[:7]), padded(WITH, WITH[3:])
    whole = generate(model, plain, steered, max_new_tokens=12, do_sample=False)[:, len(WITHOUT) :].tolist()
    ours, theirs = Listening(), Listening()
    result = generate(
        model, plain, steered, max_new_tokens=12, do_sample=False, eos_token_id=whole[0][4], streamer=ours
    )
    model.generate(
        **plain, max_new_tokens=12, do_sample=False, eos_token_id=whole[0][4], pad_token_id=0, streamer=theirs
    )
    assert (ours.ended, theirs.ended) == (1, 1)
    assert torch.equal(torch.cat([ours.heard[0], torch.stack(ours.heard[1:], dim=1)], dim=1), result)
    assert torch.equal(ours.heard[0], theirs.heard[0])
    assert {(part.shape, part.dtype) for part in ours.heard[1:]} == {
        (part.shape, part.dtype) for part in theirs.heard[1:]
    }


def test_a_streamer_of_text_comes_to_its_end(model, chat_model):
    streamer = TextIteratorStreamer(chat_model.tokenizer, skip_prompt=True, timeout=30)
    options = {"max_new_tokens": 9, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=generate, args=(model, padded(WITHOUT), padded(WITH)), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    del options["streamer"]
    reply = generate(model, padded(WITHOUT), padded(WITH), **options)[0, len(WITHOUT) :]
    assert text == chat_model.tokenizer.decode(reply)


def test_a_streamer_that_fails_ends_the_reply_with_its_own_exception(model):
    class Full(Listening):
        def put(self, value):
            super().put(value)
            if len(self.heard) == 3:
                raise OSError("no space left")

    before = threading.active_count()
    with pytest.raises(OSError, match="no space left"):
        generate(model, padded(WITHOUT), padded(WITH), max_new_tokens=200, do_sample=False, streamer=Full())
    assert threading.active_count() == before


def test_a_generation_config_s_own_values_are_taken_as_generate_takes_them(model):
    """A model's file may name sampling bounds that a greedy call has no use for, and tokens that nothing here reads."""
    plain, steered = padded(WITHOUT), padded(WITH)
    config = GenerationConfig(
        do_sample=False, top_p=0.5, top_k=3, min_p=0.1, bos_token_id=7, max_new_tokens=6, pad_token_id=0
    )
    same = generate(model, plain, steered, max_new_tokens=6, do_sample=False)
    arguments = {"principle_input_ids": steered["input_ids"], "generation_config": config}
    assert torch.equal(model.generate(**plain, custom_generate=linear_alignment, **arguments), same)


def test_an_end_token_is_the_padding_where_none_is_named(model):
    plain, steered = padded(WITHOUT, WITHOUT[:7]), padded(WITH, WITH[3:])
    whole = generate(model, plain, steered, max_new_tokens=12, do_sample=False)[:, len(WITHOUT) :].tolist()
    row = generate(
        model, plain, steered, max_new_tokens=12, do_sample=False, eos_token_id=whole[0][4], pad_token_id=None
    )
    assert set(row[0, len(WITHOUT) + whole[0].index(whole[0][4]) :].tolist()) == {whole[0][4]}


AWAY = {
    "max_length": 30,
    "max_new_tokens": 3,
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 4,
    "top_p": 0.4,
    "eos_token_id": 9,
    "pad_token_id": 9,
    "bos_token_id": 9,
    "decoder_start_token_id": 9,
    "transformers_version": "4.0",
    "use_cache": False,
    "cache_implementation": "static",
}


@pytest.mark.parametrize("name", [name for name in vars(GenerationConfig()) if not name.startswith("_")])
@pytest.mark.parametrize("sampled", [True, False])
def test_every_option_of_generate_is_honoured_or_refused_by_name(name, sampled):
    config = GenerationConfig()
    config.update(**{**NEUTRAL, "do_sample": sampled})
    check_options(config)
    setattr(config, name, AWAY.get(name, True if NEUTRAL.get(name) != 1 else 5))
    if name in (*HONOURED, *UNCONCERNED) or (name in SAMPLED and not sampled):
        check_options(config)
        return
    with pytest.raises(UsageError, match=rf"not {name}: leave that at its default"):
        check_options(config)


def test_generate_s_own_defaults_are_no_reason_to_refuse(model):
    """Those of the installed transformers, which fills them in before it calls."""
    model.generate(
        torch.tensor([WITHOUT]),
        custom_generate=linear_alignment,
        principle_input_ids=torch.tensor([WITH]),
        pad_token_id=0,
        max_new_tokens=2,
    )


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.zeros(len(input_ids), dtype=torch.bool)


ONES = torch.ones(1, 20, dtype=torch.long)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "not num_beams: leave"),
        ({"num_return_sequences": 2, "do_sample": True}, "not num_return_sequences: leave"),
        ({"repetition_penalty": 1.3}, "not repetition_penalty: leave"),
        ({"prompt_lookup_num_tokens": 4}, "not prompt_lookup_num_tokens: leave"),
        ({"min_new_tokens": 2, "eos_token_id": 3}, "not min_length, min_new_tokens: leave"),
        ({"max_time": 1.0}, "not max_time: leave"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": ONES}, "not guidance_scale: leave"),
        ({"return_dict_in_generate": True, "output_scores": True}, "not output_scores, return_dict_in_generate: leave"),
        ({"output_attentions": True}, "not output_attentions: leave"),
        ({"min_p": 0.1, "do_sample": True}, "not min_p: leave"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "not prefix_allowed_tokens_fn"),
        ({"negative_prompt_ids": ONES}, "not negative_prompt_ids"),
        ({"assistant_model": make_model(VOCABULARY, context=64)}, "not assistant_model"),
        ({"past_key_values": DynamicCache()}, "not past_key_values"),
        ({"position_ids": ONES}, "not position_ids"),
        ({"inputs_embeds": torch.zeros(1, 20, 32)}, "not inputs_embeds"),
        ({"ratio": 11.0}, "strength"),
        ({"stopping_criteria": [Never()]}, "Never"),
        ({"logits_processor": [TemperatureLogitsWarper(0.5)], "do_sample": True}, "not TemperatureLogitsWarper"),
        ({"logits_processor": [TopKLogitsWarper(5)]}, "not TopKLogitsWarper"),
        ({"stopping_criteria": [EosTokenCriteria(5)]}, "not EosTokenCriteria"),
        ({"principle_input_ids": torch.ones(2, 3, dtype=torch.long)}, "1 prompts and 2 with a principle"),
        (
            {"principle_input_ids": torch.ones(3, dtype=torch.long)},
            r"principle_input_ids are token ids.* got shape \(3,\)",
        ),
        ({"principle_input_ids": [[1, 2]]}, "got list"),
        ({"principle_input_ids": torch.ones(1, 3)}, "torch.float32"),
        (
            {"attention_mask": torch.ones(1, 7, dtype=torch.long)},
            r"of input_ids has their shape \(1, 20\), got \(1, 7\)",
        ),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, r"of input_ids has their shape \(1, 20\), got \(1, 3\)"),
        ({"attention_mask": torch.zeros(1, 20, dtype=torch.long)}, "of input_ids leaves every prompt a token"),
        ({"principle_attention_mask": ONES}, r"of principle_input_ids has their shape \(1, 32\), got \(1, 20\)"),
    ],
)
def test_what_it_does_not_take_is_refused(model, options, message):
    arguments = {"principle_input_ids": torch.tensor([WITH]), "max_new_tokens": 4, "pad_token_id": 0, **options}
    with pytest.raises(UsageError, match=message):
        model.generate(torch.tensor([WITHOUT]), custom_generate=linear_alignment, **arguments)


def test_fewer_rows_of_a_mask_than_prompts_are_refused(model):
    plain, steered = padded(WITHOUT, WITHOUT[:7]), padded(WITH, WITH[3:])
    plain["attention_mask"] = plain["attention_mask"][1:]
    with pytest.raises(UsageError, match=r"has their shape \(2, 20\), got \(1, 20\)"):
        generate(model, plain, steered, max_new_tokens=4)


def test_a_reply_longer_than_the_model_s_context_is_refused(model):
    with pytest.raises(ContextLengthError, match="exceed the model's context of 256"):
        generate(model, padded(WITHOUT), padded(WITH), max_new_tokens=230)
