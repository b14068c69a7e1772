"""Explained replies as one self-contained HTML page; every token can be pointed at, tapped or tabbed to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from prefmw.cli.output import printable
from prefmw.cli.page import page_of
from prefmw.cli.why import END, TOLD, Shown, colour, percent, times, token_text

if TYPE_CHECKING:
    from prefmw.explanation import Likelihood, Step

MOST_CHANGED = 8
"""Rows of a reply's table."""

STYLE = """
.reply { font-size: 1.15rem; line-height: 2; margin: .8rem 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { border-radius: .25em; padding: .1em 0; cursor: help; position: relative; }
.t:hover, .t:focus { outline: 2px solid var(--accent); outline-offset: 1px; }
.t[style] { color: #101010; }
.end { font-size: .8rem; color: var(--soft); padding: .15em .4em; }
.tip { display: none; position: fixed; left: 50%; bottom: .8rem; transform: translateX(-50%); z-index: 2;
  width: min(27rem, 100vw - 1rem); padding: .7rem .8rem;
  background: var(--card); color: var(--ink); border: 1px solid var(--line); border-radius: .5rem;
  box-shadow: 0 6px 24px #0003; font-size: .8rem; line-height: 1.35; white-space: normal; }
.t:hover > .tip, .t:focus > .tip { display: block; }
.tip b { font-size: .95rem; }
.alt { display: grid; grid-template-columns: 6.5rem 1fr 1fr; gap: .1rem .5rem; align-items: center; margin-top: .5rem; }
.alt .w { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-family: var(--mono); }
.alt .head { color: var(--soft); }
.said { font-weight: 700; }
.p { position: relative; display: block; background: var(--faint); border-radius: .2rem; min-width: 3.4rem; }
.p i { position: absolute; inset: 0 auto 0 0; border-radius: .2rem; background: #9aa3ab88; }
.p.a i { background: #00857888; }
.p span { position: relative; padding: 0 .3rem; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem .5rem; align-items: center; }
.legend { color: var(--soft); font-size: .85rem; }
.legend span { color: #101010; padding: 0 .5em; border-radius: .25em; }
.asked { font-size: 1.3rem; font-weight: 600; margin: 0 0 1.2rem; }
.who { margin: 0; } .how, .principle { color: var(--soft); font-size: .85rem; margin: .2rem 0; }
.principle { font-style: italic; }
.replies { display: grid; gap: 1.2rem; }
td .p { width: 7rem; }
.weights { color: var(--accent); font-size: .85rem; margin: .2rem 0 0; }
@media (max-width: 40rem) { td .p { width: auto; } }
@media print { .tip { display: none !important; } .t { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(shown: Sequence[Shown]) -> str:
    """The page."""
    asked = list(dict.fromkeys(one.found.prompt for one in shown))
    one_question = len(asked) == 1
    head = f'<p class="asked">“{escape(asked[0])}”</p>' if one_question else ""
    replies = "".join(_reply(one, asked=not one_question) for one in shown)
    body = f"""{head}
<p class="legend">Made likelier by the preference {_keys(+1)} less likely {_keys(-1)}</p>
<div class="replies">{replies}</div>
<p class="how">Each token is compared with what the same model says in the same place of the same reply
where it knows of no preference. Point at a token, tap it, or go through them by the tab key,
to see what else could have stood there.
Probabilities are at temperature 1, before anything is cut off.</p>"""
    return page_of("Why these words", body, STYLE)


def _reply(one: Shown, *, asked: bool) -> str:
    question = f'<p class="who">“{escape(one.found.prompt)}”</p>' if asked else ""
    weights = f'<p class="weights">{escape(one.weights)}</p>' if one.weights else ""
    principle = escape(one.found.plan.principle) or "no preference"
    tokens = "".join(_token(step) for step in one.found.steps)
    return f"""<section class="card">{question}
<p class="who"><strong>{escape(one.profile.user_id)}</strong> · {escape(one.about)}</p>{weights}
<p class="reply">{tokens}</p>
{_table(one)}
<details><summary>{escape(one.how)}</summary><p class="principle">{principle}</p></details>
</section>"""


def _token(step: Step) -> str:
    said = step.said
    text = f'<span class="end">{END}</span>' if said.end else escape(printable(said.text))
    space = text[: len(text) - len(text.lstrip())]
    background = colour(said.change)
    style = f' style="background:{background}"' if background else ""
    return f'{space}<span class="t" tabindex="0"{style}>{text[len(space) :]}{_tip(step)}</span>'


def _tip(step: Step) -> str:
    rows = "".join(
        f'<span class="w{" said" if one.token == step.said.token else ""}">{escape(token_text(one))}</span>'
        f"{_bar(one.plain)}{_bar(one.aligned, aligned=True)}"
        for one in step.alternatives
    )
    return (
        f'<span class="tip"><b>{escape(token_text(step.said))} {times(step.said.change)}</b> '
        f"by the preference, which moves {step.moved:.0%} of the probability here"
        f'<span class="alt"><span class="head">token</span><span class="head">plain</span>'
        f'<span class="head">preferred</span>{rows}</span></span>'
    )


def _bar(log_probability: float, *, aligned: bool = False) -> str:
    told = escape(percent(log_probability))
    width = 100 * min(1.0, 2.718281828459045**log_probability)
    return f'<span class="p{" a" if aligned else ""}"><i style="width:{width:.1f}%"></i><span>{told}</span></span>'


def _table(one: Shown) -> str:
    changed = [step for step in one.found.most_changed(MOST_CHANGED) if abs(step.said.change) >= TOLD]
    if not changed:
        return '<p class="how">The preference made no token of this reply twice or half as likely.</p>'
    rows = "".join(
        f"<tr><td><code>{escape(token_text(step.said))}</code></td><td>{_bar(step.said.plain)}</td>"
        f"<td>{_bar(step.said.aligned, aligned=True)}</td><td>{times(step.said.change)}</td>"
        f"<td>{_instead(step.plain_favourite, step.said)}</td></tr>"
        for step in changed
    )
    return (
        '<div class="wide"><table><thead><tr><th>token</th><th>plain</th><th>with the preference</th><th>change</th>'
        f"<th>plain would rather say</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _instead(favourite: Likelihood, said: Likelihood) -> str:
    if favourite.token == said.token:
        return f"the same {escape(percent(favourite.plain))}"
    return f"<code>{escape(token_text(favourite))}</code> {escape(percent(favourite.plain))}"


def _keys(sign: int) -> Iterable[str]:
    from math import log

    mark = "×" if sign > 0 else "÷"
    return "".join(
        f'<span style="background:{colour(sign * log(factor))}">{mark}{factor}</span>' for factor in (3, 10, 100)
    )
