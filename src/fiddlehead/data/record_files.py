"""Rows in files: lines and arrays of JSON, Parquet, and folders that `datasets` saved to disk."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fiddlehead.data.readers import (
    JSON_ARRAY_SUFFIXES,
    LINES_SUFFIXES,
    PARQUET_SUFFIX,
    array_elements,
    begins_array,
    bounded_lines,
    known_suffix,
    read_array,
    uncompressed,
)
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.foreign import has_half_pair, inside, parse_json, read_json


def read_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Yields for each row its place (file, and line or row), its values, and why it cannot be read, or "".

    Raises:
        ConfigError: the file or folder is missing, of an unknown kind or broken.
    """
    suffix = known_suffix(path)
    if path.is_dir():
        for file in _saved_files(path):
            yield from _arrow_rows(file, is_parquet=False)
    elif not path.is_file():
        raise ConfigError(Problem("paths", message=f"there is no file or folder {path}"))
    elif suffix in LINES_SUFFIXES:
        yield from _json_rows(path, suffix)
    elif suffix == PARQUET_SUFFIX:
        yield from _arrow_rows(path, is_parquet=True)
    else:
        allowed = (*sorted(LINES_SUFFIXES | {PARQUET_SUFFIX}), "a folder of `datasets`")
        raise ConfigError(Problem("paths", message=f"{path} is of an unknown kind", allowed=allowed))


def parse_line(line: bytes) -> tuple[Any, str]:
    """The values of a line of JSONL, and why they cannot be read, or ""."""
    try:
        values = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"is not valid UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
    except json.JSONDecodeError as error:
        return None, f"is not valid JSON: column {error.colno}: {error.msg}"
    except ValueError as error:
        return None, f"is not JSON that can be read: {error}"
    return (None, "is not valid Unicode: has half a surrogate pair") if has_half_pair(line, values) else (values, "")


def _json_rows(path: Path, suffix: str) -> Iterator[tuple[str, Any, str]]:
    try:
        with path.open("rb") as raw:
            lines = uncompressed(raw, suffix)
            if suffix in JSON_ARRAY_SUFFIXES and begins_array(lines):
                numbered = array_elements(read_array(lines, path))
            else:
                numbered = enumerate(bounded_lines(lines), start=1)
            for number, text in numbered:
                if text.strip():
                    yield f"{path}:{number}", *parse_line(text)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(Problem.in_file(path, f"cannot be read: {error}")) from error


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `datasets` saved to disk."""
    state, splits = folder / "state.json", folder / "dataset_dict.json"
    try:
        if splits.is_file():
            names = [folder / name for name in read_json(splits)["splits"]]
            raise ConfigError(Problem("paths", message=f"{folder} has several data sets; name some", allowed=names))
        if not state.is_file():
            message = (
                f"{folder} has no state.json, so `datasets` did not save it, and no training.jsonl, so it is not a "
                "folder of NeMo"
            )
            raise ConfigError(Problem("paths", message=message))
        return [inside(folder, file["filename"], state) for file in read_json(state)["_data_files"]]
    except ConfigError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        message = f"{folder} is not a folder that `datasets` saved: {error!r}"
        raise ConfigError(Problem("paths", message=message)) from error


def _arrow_rows(file: Path, *, is_parquet: bool) -> Iterator[tuple[str, Any, str]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.memory_map(str(file)) as source:
            if is_parquet:
                batches = pyarrow.parquet.ParquetFile(source).iter_batches()
            else:
                batches = pyarrow.ipc.open_stream(source)
            for batch in batches:
                batch.validate(full=True)  # without it, a broken file could read from anywhere in memory
                for values in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", _without_nulls(values), ""
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # of fields with one name; of text that is not UTF-8
        raise ConfigError(Problem.in_file(file, f"cannot be read after row {number}: {error}")) from error


def _without_nulls(value: Any) -> Any:
    """A row without the fields that are null, which it has only because other rows of the table have them.

    Templates write every field of a tool, and test for fields of a message. A null `content` of a message stays.
    """
    if isinstance(value, dict):
        kept = {name: field for name, field in value.items() if field is not None or name == "content"}
        return {name: _without_nulls(field) for name, field in kept.items()}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
