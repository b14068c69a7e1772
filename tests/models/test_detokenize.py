"""Tokens to text as they come: whole characters, and stop strings that never show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmw.models import Detokenizer
from tests.toymodels import make_tokenizer

TOKENIZERS = {family: make_tokenizer(family) for family in ("chatml", "mistral", "gemma")}
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=40)


def ids_of(family: str, text: str) -> list[int]:
    return TOKENIZERS[family](text, add_special_tokens=False)["input_ids"]


def stream(family: str, ids: list[int], stop=()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(TOKENIZERS[family], stop)
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    return pieces, detokenizer


@pytest.mark.parametrize("family", sorted(TOKENIZERS))
@given(text=texts)
def test_pieces_joined_are_the_text_decoded_at_once(family, text):
    ids = ids_of(family, text)
    pieces, detokenizer = stream(family, ids)
    whole = TOKENIZERS[family].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == whole == detokenizer.text


@pytest.mark.parametrize("family", sorted(TOKENIZERS))
def test_a_character_of_several_tokens_comes_whole(family):
    pieces, _ = stream(family, ids_of(family, "a 🛌 b"))
    assert "".join(pieces).strip() == "a 🛌 b"
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_have_no_text():
    tokenizer = TOKENIZERS["chatml"]
    ids = [*ids_of("chatml", "one"), tokenizer.eos_token_id, *ids_of("chatml", " two")]
    assert "".join(stream("chatml", ids)[0]) == "one two"


@pytest.mark.parametrize("family", sorted(TOKENIZERS))
@given(text=texts, stop=st.text(st.sampled_from("ab \n."), min_size=1, max_size=4))
def test_a_stop_string_ends_the_text_and_never_shows(family, text, stop):
    ids = ids_of(family, text)
    whole = TOKENIZERS[family].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    pieces, detokenizer = stream(family, ids, [stop])
    assert "".join(pieces) == whole.split(stop)[0]
    assert detokenizer.stopped == (stop in whole)


def test_a_nul_becomes_a_character_that_every_store_holds():
    nul = TOKENIZERS["chatml"].convert_tokens_to_ids("Ā")  # byte 0
    assert "".join(stream("chatml", [nul, *ids_of("chatml", "x")])[0]) == "\ufffdx"


def test_the_earliest_of_several_stop_strings_wins():
    pieces, _ = stream("chatml", ids_of("chatml", "one two three"), ["three", "two"])
    assert "".join(pieces) == "one "


def test_text_is_given_out_as_soon_as_no_stop_string_can_swallow_it():
    detokenizer = Detokenizer(TOKENIZERS["chatml"], ["xyz"])
    given = "".join(detokenizer.push(token) for token in ids_of("chatml", "abcx"))
    assert given == "abc"
    assert detokenizer.finish() == "x"


def test_bytes_that_never_make_a_character_do_not_hold_the_rest_back():
    tokenizer = TOKENIZERS["chatml"]
    lone = tokenizer.convert_tokens_to_ids("Ģ")  # byte 0xA2, a continuation without a beginning
    pieces, _ = stream("chatml", [lone] * 100 + ids_of("chatml", "end"))
    assert any(pieces[:50])
    assert "".join(pieces).endswith("end")
