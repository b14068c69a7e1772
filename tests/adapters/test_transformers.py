"""Linear Alignment through transformers' own generate."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria

from prefmw.adapters.transformers import linear_alignment
from prefmw.errors import UsageError
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
        pad_token_id=0,
        **options,
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


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "one beam"),
        ({"repetition_penalty": 1.3}, "not RepetitionPenaltyLogitsProcessor"),
        ({"ratio": 11.0}, "strength"),
        ({"principle_input_ids": torch.ones(2, 3, dtype=torch.long)}, "1 prompts and 2 with a principle"),
        ({"stopping_criteria": [Never()]}, "Never"),
    ],
)
def test_what_it_does_not_take_is_refused(model, options, message):
    arguments = {"principle_input_ids": torch.tensor([WITH]), "max_new_tokens": 4, "pad_token_id": 0, **options}
    with pytest.raises(UsageError, match=message):
        model.generate(torch.tensor([WITHOUT]), custom_generate=linear_alignment, **arguments)
