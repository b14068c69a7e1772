"""`prefmw bench`: what steering costs, and what remembering costs."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Annotated, Any

import typer

from prefmw.cli.options import JsonOption
from prefmw.cli.output import print_json, print_table, progress, progress_bar
from prefmw.errors import UsageError

MOST = 100_000
"""Of users, or of tokens of context, that can be asked for."""

app = typer.Typer(help="What steering and remembering cost, measured.", no_args_is_help=True)


@app.command()
def decode(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A chat model: tiny, a folder or a hub id.")
    ] = None,
    shape: Annotated[str | None, typer.Option("--shape", help="Random weights of that shape, 60m say.")] = None,
    methods: Annotated[str, typer.Option("--methods", help="Methods to time, joined by commas.")] = "none,linear,pad",
    users: Annotated[str, typer.Option("--users", help="Users at once, joined by commas.")] = "1",
    context: Annotated[str, typer.Option("--context", help="Tokens of context, joined by commas.")] = "256",
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of a reply.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds, each of every way once.")] = 5,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="float32, bfloat16 or float16; may be given several times.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Torch device; auto is cuda, else cpu.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Time decoding: every method beside transformers' generate, two forwards a token, and classifier-free guidance."""
    import torch

    from prefmw.evaluation.decode_speed import (
        check_context,
        check_methods,
        check_shape,
        measure,
        one_by_one,
        random_model,
    )
    from prefmw.models.chat_model import find_device

    if (model is None) == (shape is None):
        raise UsageError("name either --model or --shape")
    if shape is not None:
        check_shape(shape)
    names = _listed(methods, "methods")
    device = str(find_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device))
    dtypes = _once(dtype or (["bfloat16"] if device.startswith("cuda") else ["float32"]), "dtype")
    cases = [(count, length) for count in _numbers(users, "users") for length in _numbers(context, "context")]
    check_methods(names)
    kinds = [_dtype(kind) for kind in dtypes]
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar:
        ways = len({"none", *names}) + 3
        task = bar.add_task("decoding", total=len(dtypes) * len(cases) * rounds * ways)
        for kind, dtype_ in zip(dtypes, kinds, strict=True):
            module = _load(model, kind, device) if model else random_model(str(shape), dtype_, device)
            for _, length in cases:
                check_context(module, length, tokens)
            for count, length in cases:
                rows += measure(
                    module,
                    methods=names,
                    users=count,
                    context=length,
                    tokens=tokens,
                    rounds=rounds,
                    progress=lambda: bar.advance(task),
                )
                for name in names if count > 1 else ():
                    together = one_by_one(module, name, users=count, context=length, tokens=tokens, rounds=rounds)
                    next(row for row in reversed(rows) if row["method"] == name).update(together)
            del module
    _against_fastest_plain(rows)
    settings = {
        "model": model or shape,
        "tokens": tokens,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    if json:
        print_json({"rows": rows, "settings": settings})
        return
    columns = (
        "method users context dtype ms/token tokens/s /plain /generate /two-forward together ttft parked MB".split()
    )
    print_table(columns, [_cells(row) for row in rows])
    print(
        "/plain, /generate, /two-forward: ms/token over that way's. together: tokens/s of these users together, while\n"
        "they reply, over one after another. ttft, parked: ms to the first token, cold and in a second turn. MB: the\n"
        "replies' keys and values, on a GPU all that a reply takes."
    )


@app.command()
def store(
    database: Annotated[
        str, typer.Option("-d", "--database", metavar="URL", help="A database of its own for this; it must be empty.")
    ],
    people: Annotated[int, typer.Option("--people", min=1, help="People stored before anything is timed.")] = 100_000,
    samples: Annotated[int, typer.Option("--samples", min=100, help="Reads, and writes, that are timed.")] = 5000,
    seed: Annotated[int, typer.Option("--seed", help="Of the people and of who is read.")] = 0,
    json: JsonOption = False,
) -> None:
    """Time reading a profile and writing a weight among many people, and fifty writers of one person."""
    from prefmw.settings import load_settings
    from prefmw.stores import SQLPreferenceStore
    from prefmw.stores.speed import store_rows

    opened = SQLPreferenceStore(load_settings({"database": database}).database_url)
    try:
        with progress("people") as advance:
            rows = store_rows(opened, people, samples, seed, advance)
    finally:
        opened.close()
    settings = {"database": opened.name, "people": people, "seed": seed, "sqlalchemy": version("sqlalchemy")}
    if json:
        print_json({"rows": rows, "settings": settings})
        return
    for row in rows:
        figures = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if name != "what" and value is not None
        )
        print(f"{row['what']:<26} {figures}")


def _load(name: str, dtype: str, device: str) -> Any:
    from prefmw.embedded import find_embedded
    from prefmw.models import ModelSpec, load_chat_model

    return load_chat_model(ModelSpec(name=name, path=find_embedded(name), dtype=dtype, device=device)).module


def _dtype(name: str) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UsageError(f"no dtype '{name[:40]}'; choose from {', '.join(known)}")
    return known[name]


def _listed(text: str, what: str) -> list[str]:
    """What an option joins by commas, each once and none empty."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"--{what} joins its values by commas and leaves none empty, got '{text[:40]}'")
    return _once(parts, what)


def _once(parts: list[Any], what: str) -> list[Any]:
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise UsageError(f"--{what} names {twice[0]} twice; name each once")
    return parts


def _numbers(text: str, what: str) -> list[int]:
    parts = _listed(text, what)
    if not all(part.isascii() and part.isdigit() and len(part) < 9 and 0 < int(part) <= MOST for part in parts):
        raise UsageError(f"--{what} takes whole numbers from 1 to {MOST}, joined by commas, got '{text[:40]}'")
    return _once([int(part) for part in parts], what)


def _against_fastest_plain(rows: list[dict[str, Any]]) -> None:
    """Beside the ratio to plain decoding in the same type, that to the faster type's."""
    for row in rows:
        plain = [
            other["ms_per_token"]
            for other in rows
            if other["method"] == "none" and (other["users"], other["context"]) == (row["users"], row["context"])
        ]
        if plain:
            row["ratio_to_fastest_plain"] = round(row["ms_per_token"] / min(plain), 3)


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else ""

    return [
        row["method"],
        str(row["users"]),
        str(row["context"]),
        row["dtype"],
        cell("ms_per_token", 2),
        cell("tokens_per_s", 0),
        cell("ratio_to_plain", 2),
        cell("ratio_to_generate", 2),
        cell("ratio_to_two_forward", 2),
        cell("decode_together_to_one_by_one", 2),
        cell("ttft_ms", 0),
        cell("parked_ttft_ms", 0),
        cell("memory_mb", 0),
    ]
