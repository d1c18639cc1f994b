"""Documents in files: the files, their order, and blocks of them that any process can parse."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError, Problem, nearest, refuse

TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".rst", ".tex", ".html", ".css", ".csv", ".toml", ".yaml", ".yml", ".xml", ".sql", ".sh"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".js", ".ts"}
    | {".jsx", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".scala", ".swift", ".hs", ".ml"}
)
"""A file is one document."""
_COMPRESSED = ("", ".gz", ".zst")
JSON_ARRAY_SUFFIXES = frozenset(f".json{end}" for end in _COMPRESSED)
"""A JSON array of objects, or an object on each line."""
LINES_SUFFIXES = JSON_ARRAY_SUFFIXES | frozenset(
    f"{name}{end}" for name in (".jsonl", ".ndjson") for end in _COMPRESSED
)
"""A line is a JSON object with a document."""
PARQUET_SUFFIX = ".parquet"
"""A row is a document."""
_KINDS = (
    PARQUET_SUFFIX,
    *(f"{suffix} (JSON objects)" for suffix in sorted(LINES_SUFFIXES)),
    "text such as .txt, .md, .py",
)

_BLOCK_BYTES = 1 << 22
_MAX_LINE = 1 << 26
_MAX_RATIO = 20


@dataclass(frozen=True)
class Block:
    """Documents of one file as read: a whole text, JSON objects, or values of a column."""

    path: str
    items: bytes | list[bytes] | list[Any]
    numbers: Sequence[int]
    """The line or row of each item, from 1."""
    size: int
    """The bytes of the file that this block covers."""


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files of `paths` in the given order; a folder gives all files in it that can be read, sorted.

    Hidden files and `__pycache__` are left out. Files of other kinds in a folder are left out with one warning. Raises
    one `ConfigError` for all paths that are missing, of an unknown kind or given twice.
    """
    files: dict[Path, Path] = {}
    problems: list[Problem] = []
    skipped: Counter[str] = Counter()
    for path in map(Path, paths):
        found: list[Path] = []
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p.relative_to(path))]
            found = [p for p in inside if known_suffix(p)]
            skipped.update(p.suffix or p.name for p in inside if not known_suffix(p))
            if not found:
                problems.append(Problem("paths", message=f"{path} has no file that can be read", allowed=_KINDS))
        elif not path.exists():
            problems.append(Problem("paths", message=f"there is no file or folder {path}"))
        elif not path.is_file():
            problems.append(Problem("paths", message=f"{path} is not a plain file"))
        elif not known_suffix(path):
            problems.append(Problem("paths", message=f"{path} is of an unknown kind", allowed=_KINDS))
        else:
            found = [path]
        for file in found:
            if file.resolve() in files:
                problems.append(Problem("paths", message=f"{file} is given twice"))
            files[file.resolve()] = file
    if not paths:
        problems.append(Problem("paths", message="is empty; give files or folders"))
    refuse(problems)
    if skipped:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(10))
        warnings.warn(f"skipped {skipped.total()} files of other kinds: {counts}", stacklevel=3)
    return list(files.values())


def read_blocks(file: Path, text_field: str) -> Iterator[Block]:
    """The blocks of `file` in order; raises `ConfigError` if it cannot be read."""
    suffix = known_suffix(file)
    try:
        if suffix == PARQUET_SUFFIX:
            yield from _read_parquet(file, text_field)
        elif suffix in LINES_SUFFIXES:
            yield from _read_lines(file, suffix)
        else:
            content = file.read_bytes()
            yield Block(str(file), content, (1,), len(content))
    except ConfigError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(Problem.in_file(file, f"cannot be read: {error}")) from error


def parse(block: Block, text_field: str) -> tuple[list[str], list[Problem]]:
    """The documents of `block` that are not empty, and its problems with file and line."""
    texts: list[str] = []
    problems: list[Problem] = []
    items: list[Any] = [block.items] if isinstance(block.items, bytes) else block.items
    is_lines = known_suffix(Path(block.path)) in LINES_SUFFIXES
    for number, item in zip(block.numbers, items, strict=True):
        try:
            text = _line_text(item, text_field) if is_lines else _text(item)
        except ValueError as error:
            place = block.path if isinstance(block.items, bytes) else f"{block.path}:{number}"
            problems.append(Problem.in_file(place, str(error)))
        else:
            if text:
                texts.append(text)
    return texts, problems


def _line_text(line: bytes, text_field: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(_text(line.rstrip()))
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object on one line: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    if text_field not in record:
        raise ValueError(_no_field(text_field, list(record)))
    return _text(record[text_field])


def _text(value: Any) -> str:
    """The text of bytes or of a string; raises `ValueError` with the reason for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None
    if not isinstance(value, str):
        raise ValueError(f"the text is not a string but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise ValueError(f"not Unicode: half a surrogate pair at {error.start}") from None
    return value


def uncompressed(raw: io.BufferedReader, suffix: str) -> io.BufferedReader | gzip.GzipFile:
    """The content of an open file, decompressed if its suffix ends with .gz or .zst; a broken one raises `OSError`."""
    if suffix.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if suffix.endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))  # pyright: ignore[reportArgumentType]
    return raw


def begins_array(content: io.BufferedReader | gzip.GzipFile) -> bool:
    """Whether the content begins like a JSON array; it consumes nothing."""
    return content.peek(1).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def array_elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the line, from 1, and the JSON text of each element of a JSON array.

    Raises:
        ValueError: the content is not a JSON array; with the line.
    """
    text = _text(content)
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")

    def skip_blank(at: int) -> int:
        return blank.match(text, at).end()  # type: ignore[union-attr]

    at = skip_blank(skip_blank(0) + 1)
    line, separator = 1 + text.count("\n", 0, at), ","
    if text[at : at + 1] == "]":
        at, separator = skip_blank(at + 1), "]"
    while separator == ",":
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a JSON array: line {error.lineno}, column {error.colno}: {error.msg}") from None
        except RecursionError:
            raise ValueError(f"not a JSON array that can be read: line {line}: nested too deep") from None
        yield line, text[at:end].encode()
        end = skip_blank(end)
        separator = text[end : end + 1]
        if separator not in (",", "]"):
            line += text.count("\n", at, end)
            raise ValueError(f"not a JSON array: line {line}: an element is followed by neither a comma nor a bracket")
        after = skip_blank(end + 1)
        line, at = line + text.count("\n", at, after), after
    if at < len(text):
        raise ValueError(f"not a JSON array: line {line}: something follows its end")


def bounded_lines(content: io.BufferedReader | gzip.GzipFile) -> Iterator[bytes]:
    """Yields the lines of a file; raises ValueError for a line longer than any document, without reading all of it."""
    number = 1
    while line := content.readline(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
            raise ValueError(f"line {number} has more than {_MAX_LINE:,} bytes")
        yield line
        number += 1


def read_array(content: io.BufferedReader | gzip.GzipFile, file: Path) -> bytes:
    """All of a file; raises ValueError if a small compressed one is enormous, without reading all of it."""
    limit = max(_MAX_LINE, _MAX_RATIO * file.stat().st_size)
    data = content.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"has more than {limit:,} bytes when decompressed")
    return data


def _block_of(lines: Iterator[bytes]) -> Iterator[bytes]:
    size = 0
    for line in lines:
        yield line
        size += len(line)
        if size >= _BLOCK_BYTES:
            return


def _read_array(file: Path, content: bytes) -> Iterator[Block]:
    elements, size = list(array_elements(content)), file.stat().st_size
    for first in range(0, len(elements), 1024):
        chosen = elements[first : first + 1024]
        share = size * (first + len(chosen)) // len(elements) - size * first // len(elements)
        yield Block(str(file), [text for _, text in chosen], [line for line, _ in chosen], share)


def _read_lines(file: Path, suffix: str) -> Iterator[Block]:
    with file.open("rb") as raw:
        lines = uncompressed(raw, suffix)
        if suffix in JSON_ARRAY_SUFFIXES and begins_array(lines):
            yield from _read_array(file, read_array(lines, file))
            return
        first, position = 1, 0
        numbered = bounded_lines(lines)
        while items := list(_block_of(numbered)):
            here = raw.tell()
            yield Block(str(file), items, range(first, first + len(items)), here - position)
            first, position = first + len(items), here


def _read_parquet(file: Path, text_field: str) -> Iterator[Block]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            if text_field not in table.schema_arrow.names:
                raise ConfigError(Problem.in_file(file, _no_field(text_field, table.schema_arrow.names)))
            rows, size, first = table.metadata.num_rows, file.stat().st_size, 1
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                items = batch.column(0).to_pylist()
                last = first + len(items)
                # Whole-number shares of the file's size that add up to it.
                yield Block(
                    str(file), items, range(first, last), size * (last - 1) // rows - size * (first - 1) // rows
                )
                first = last
    except pa.ArrowException as error:
        raise ConfigError(Problem.in_file(file, f"cannot be read: {error}")) from error


def _no_field(name: str, names: Sequence[str]) -> str:
    match = nearest(name, names)
    return f"no field {name!r}; " + (f"did you mean {match!r}?" if match else f"fields: {', '.join(names) or 'none'}")


def known_suffix(path: Path) -> str:
    """The suffix of `path` in lower case, or "" if no file with it can be read; `.jsonl.gz` is one suffix."""
    double = "".join(path.suffixes[-2:]).lower()
    single = path.suffix.lower()
    known = TEXT_SUFFIXES | LINES_SUFFIXES | {PARQUET_SUFFIX}
    return double if double in known else single if single in known else ""


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
