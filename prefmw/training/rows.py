"""Rows of data for the trainers, from the files that such data comes in."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefmw.errors import MissingExtraError, UsageError

_SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(path: Path, left_out: Counter[str]) -> Iterator[Mapping[str, Any]]:
    """The objects in a file of JSON lines, a JSON list or Parquet (``.gz`` for the first two); what is no object is
    counted in ``left_out``.

    Raises:
        UsageError: the file cannot be read, or is of another kind.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _SUFFIXES:
        if not os.path.exists(path):
            raise UsageError(f"there is no '{path}'; name a file of rows: {', '.join(_SUFFIXES)}")
        raise UsageError(f"'{path}' is no file of rows: expected {', '.join(_SUFFIXES)}, the first two also as .gz")
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode()
    except (OSError, EOFError) as error:
        raise UsageError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not valid UTF-8; re-encode it") from error
    if suffix == ".json":
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"'{path}' is no JSON: {error}") from error
        if not isinstance(entries, list):
            raise UsageError(f"'{path}' holds no list; expected one of objects")
        yield from (entry for entry in entries if _is_row(entry, left_out))
        return
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            left_out["that are no JSON"] += 1
            continue
        if _is_row(entry, left_out):
            yield entry


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("reading Parquet", "train") from error
    try:
        yield from parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise UsageError(
            f"'{path}' is no Parquet file, or is cut short: {' '.join(str(error).split())[:200]}"
        ) from error


def _is_row(entry: Any, left_out: Counter[str]) -> bool:
    if not isinstance(entry, dict):
        left_out["that are no objects"] += 1
    return isinstance(entry, dict)
