"""What a clause is about, and whether it is wanted: cues of rejection taken out of it (``cues.toml``)."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class Subject(NamedTuple):
    """What a clause is about in its own words, without its cues; whether it wants that (1) or not (-1); how many cues
    of rejection were taken out.
    """

    text: str
    wanted: int
    cues: int


def subject(clause: str) -> Subject:
    """Take a clause's cues out: ``"I can't stand puns"`` is about ``"I puns"``, which it does not want.

    Of a contrast ("images rather than figures") only what is wanted is kept. Where nothing is left, the clause is.
    """
    wanting, rejecting, contrasts = _patterns()
    for contrast in contrasts:
        if found := contrast.search(clause):
            return subject(found["wanted"])
    text, _ = wanting.subn(" ", clause)
    text, cues = rejecting.subn(" ", text)
    text = " ".join(text.split()).strip(" ,.;!?")
    return Subject(text or clause, -1 if cues % 2 else 1, cues)


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], list[re.Pattern[str]]]:
    table = tomllib.loads(files("prefmw.preferences").joinpath("cues.toml").read_text(encoding="utf-8"))

    def pattern(text: str) -> str:
        return text.replace(" ", r"\s+").replace("'", "['’]?")

    refusal = "(?:" + "|".join(map(pattern, table["not"])) + ")"

    def joined(name: str) -> re.Pattern[str]:
        return re.compile(r"\b(?:" + "|".join(pattern(x).replace("NOT", refusal) for x in table[name]) + r")\b", re.I)

    wanted = "(?P<wanted>.+?)"
    contrasts = [re.compile(pattern(text.replace("WANTED", wanted)), re.I) for text in table["contrasts"]]
    return joined("wanting"), joined("rejecting"), contrasts
