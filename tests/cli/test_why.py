"""`prefmw why`: on the terminal, as JSON, as a page and as a picture, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from prefmw.cli.why import colour, percent, strength_of, times

QUESTION = "How do I fall asleep faster?"


@pytest.fixture
def people(prefmw):
    for name, persona, weights in (
        ("alice", "a nurse who wants only the <b>essentials</b>", ["verbosity=-1"]),
        ("bob", "a retired teacher", ["humor=1", "friendliness=1"]),
    ):
        prefmw("users", "add", name, "--persona", persona)
        prefmw("prefs", "set", name, *weights)
        code, _, err = prefmw("chat", QUESTION, "-u", name, "--seed", "4", "--method", "linear")
        assert (code, err) == (0, "")


def test_it_is_told_in_words_and_as_json(prefmw, people):
    code, out, err = prefmw("why", "-u", "bob")
    assert (code, err) == (0, "")
    assert "bob, turn 2: linear 2 on tiny, seed 4" in out
    assert "humor +1" in out
    assert re.search(r"\[\w+", out)  # without colours what was made likelier stands in brackets
    assert re.search(r"token +plain +aligned +change", out)
    assert json.loads(prefmw("why", "1", "-u", "alice", "--json")[1])["turn"] == 1
    code, _, err = prefmw("why", "2", "-u", "alice")
    assert (code, "'alice' has no turn 2" in err) == (2, True)
    one = json.loads(prefmw("why", "-u", "bob", "--json")[1])
    assert {"user", "turn", "model", "method", "strength", "principle", "weights", "text", "tokens"} <= set(one)
    assert {"token", "text", "end", "aligned", "plain", "change", "moved", "alternatives"} == set(one["tokens"][0])
    both = json.loads(prefmw("why", "-u", "bob", "-u", "alice", "--json")[1])
    assert [one["user"] for one in both] == ["bob", "alice"]


class Balanced(HTMLParser):
    """Fails where tags do not close in order; keeps the text of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_and_picture_stand_alone_and_escape_what_people_wrote(prefmw, people, tmp_path):
    path = tmp_path / "why.html"
    code, out, err = prefmw("why", "-u", "alice", "-u", "bob", "--out", str(path))
    assert (code, out, "2 replies" in err) == (0, "", True)
    page = path.read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "essentials&lt;/b&gt;" in page
    assert "<b>essentials" not in page
    assert "&lt;0.1 %" in page
    assert "<0.1 %" not in page
    assert not re.search(r"https?://|<script|<link|src=", page)
    assert 'name="viewport"' in page
    assert "@media print" in page

    path = tmp_path / "why.svg"
    prefmw("why", "-u", "alice", "-u", "bob", "--out", str(path))
    tree = ElementTree.parse(path)
    said = "".join(node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")).replace(" ", "")
    text = json.loads(prefmw("why", "-u", "bob", "--json")[1])["text"]
    assert text.replace(" ", "") in said
    width = float(tree.getroot().get("width"))
    for node in tree.iter("{http://www.w3.org/2000/svg}text"):
        assert float(node.get("x")) + float(node.get("textLength", 0)) <= width


def test_mistakes_are_one_line(prefmw):
    prefmw("users", "add", "alice")
    for arguments, said in (
        ([], "whose reply?"),
        (["-u", "nobody"], "nobody"),
        (["-u", "alice"], "'alice' has no turn yet"),
        (["1", "-u", "alice", "-u", "bob"], "a turn is one user's"),
        (["-u", "alice", "--out", "why.gif"], "an ending in .html or .svg"),
        (["-u", "alice", "--out", "/nowhere/why.svg"], "a folder that exists"),
    ):
        code, out, err = prefmw("why", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err


def test_colours_grow_with_the_change():
    assert colour(0.5) is None
    assert colour(-0.5) is None
    assert strength_of(math.log(3)) < strength_of(math.log(30)) < strength_of(math.log(100)) == strength_of(99) == 1
    assert colour(2) != colour(-2)


def test_control_characters_are_shown_and_break_no_picture():
    from prefmw.cli.why import Shown
    from prefmw.cli.why_page import page
    from prefmw.cli.why_picture import picture
    from prefmw.decoding import Sampling
    from prefmw.explanation import Explanation, Likelihood, Step
    from prefmw.plans import Plan
    from prefmw.preferences import Profile

    said = Likelihood(1, " a\x1b[2J<b>\x00\n", False, -0.1, -9.0)
    plan = Plan("linear", 2.0, "", 1, {}, Sampling(0.7, 0.8, None, 1, 0))
    found = Explanation(plan, {}, "\x07Why?", (Step(said, (said,), 0.9),))
    shown = [Shown(Profile("eve", "", revision=1), None, "toy", found)]
    assert "\\x1b[2J" in "".join(ElementTree.fromstring(picture(shown)).itertext())
    assert "\\x1b[2J&lt;b&gt;" in page(shown)


def test_numbers_are_put_as_people_read_them():
    assert [times(math.log(x)) for x in (1, 2, 82, 1 / 3, 4321)] == ["=", "×2.0", "×82", "÷3.0", "×4 321"]
    assert times(math.inf) == "×100 000+"
    assert [percent(math.log(x)) for x in (0.9999, 0.5, 0.0123, 0.0001)] == ["100 %", "50 %", "1.2 %", "<0.1 %"]
