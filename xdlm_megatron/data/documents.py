"""Reads documents from JSON lines and plain text, packed (.gz, .xz) or not, in blocks for worker processes.

A block holds undecoded lines: the parent only cuts files, the workers parse. A line that is no document is
never fatal: it comes back as a `Skip` with its reason.
"""

import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from xdlm_megatron.data.errors import DataError

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """Consecutive documents of one file, not yet parsed. first_line counts from 1.

    disk_bytes: bytes of the file on disk (packed, perhaps) that this block has used up.
    """

    path: str
    first_line: int
    lines: list[bytes]
    is_json: bool
    disk_bytes: int


@dataclass(frozen=True)
class Document:
    """texts: (text,), or (prompt, text). where: "file:line"."""

    where: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Skip:
    """A line that gave no document. where: "file:line"."""

    where: str
    reason: str


def _open_xz(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, lzma.open(stream))


def _open_gzip(stream: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.open(stream))


# A new packing or a new kind of text is a line here. Text is one document a file.
UNPACKERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {".gz": _open_gzip, ".xz": _open_xz}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md")


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files named by paths and globs, in the order given, a glob's files sorted. Raises DataError."""
    found: list[Path] = []
    for pattern in patterns:
        # A path that exists is taken as it is, brackets and all.
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise DataError(f"input {pattern}: no such file; give files or globs (quote a glob)")
        found += [path for path in map(Path, names) if path not in found]
    for path in found:
        if path.is_dir():
            raise DataError(f"input {path} is a folder; name its files, for example '{path}/*.jsonl.gz'")
        if _kind(path) not in (*JSON_SUFFIXES, *TEXT_SUFFIXES):
            kinds = " ".join((*JSON_SUFFIXES, *TEXT_SUFFIXES))
            packed = " or ".join(UNPACKERS)
            raise DataError(
                f"input {path}: unknown kind of file; its name must end in one of {kinds} (+ {packed})"
            )
    return found


def read_blocks(paths: Iterable[Path], block_bytes: int) -> Iterator[Block]:
    """Yields blocks of about `block_bytes` bytes of text in file order; a text file is one block."""
    for path in paths:
        with path.open("rb") as disk:
            unpack = UNPACKERS.get(path.suffix)
            stream = io.BufferedReader(unpack(disk), 1 << 20) if unpack else disk  # type: ignore[type-var, arg-type]
            is_json = _kind(path) in JSON_SUFFIXES
            line, used = 1, 0
            try:
                while lines := (stream.readlines(block_bytes) if is_json else [stream.read()]):
                    if line == 1:
                        lines[0] = lines[0].removeprefix(BOM)
                    yield Block(str(path), line, lines, is_json, disk.tell() - used)
                    line, used = line + len(lines), disk.tell()
                    if not is_json:
                        break
            except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(
                    f"input {path} is damaged or not {path.suffix[1:]} ({error}); fetch it again"
                ) from error


def parse(block: Block, json_key: str, prompt_key: str | None = None) -> Iterator[Document | Skip]:
    """Yields each document, or why a line gave none; blank lines give nothing. A prompt may be empty."""
    for number, line in enumerate(block.lines, block.first_line):
        if block.is_json and not line.strip():
            continue
        where = f"{block.path}:{number}"
        try:
            texts = (_json_texts if block.is_json else _plain_text)(line, json_key, prompt_key)
        except _NoDocumentError as reason:
            yield Skip(where, str(reason))
        else:
            yield Document(where, texts)


class _NoDocumentError(Exception):
    """Why a line gives none."""


def _json_texts(line: bytes, key: str, prompt_key: str | None) -> tuple[str, ...]:
    """(text,), or (prompt, text)."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _NoDocumentError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise _NoDocumentError("not JSON") from None
    if not isinstance(record, dict):
        raise _NoDocumentError("not a JSON object")
    text = _whole(_string(record, key))
    return (text,) if prompt_key is None else (_encodable(_string(record, prompt_key)), text)


def _string(record: dict, key: str) -> str:
    if key not in record:
        raise _NoDocumentError(f"no key {key!r}")
    text = record[key]
    if not isinstance(text, str):
        raise _NoDocumentError(f"{key!r} is not a string")
    return text


def _plain_text(raw: bytes, _: str, prompt_key: str | None) -> tuple[str, ...]:
    if prompt_key is not None:
        raise _NoDocumentError(f"plain text, which has no {prompt_key!r}")
    try:
        return (_whole(raw.decode("utf-8")),)
    except UnicodeDecodeError:
        raise _NoDocumentError("not UTF-8") from None


def _whole(text: str) -> str:
    if not text or text.isspace():
        raise _NoDocumentError("empty text")
    return _encodable(text)


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _NoDocumentError(
            "half a surrogate pair"
        ) from None  # JSON may spell \ud800; no tokenizer takes it
    return text


def _kind(path: Path) -> str:
    """The ending that says what the text is: ".jsonl" of "a.jsonl.xz"."""
    return (path.with_suffix("") if path.suffix in UNPACKERS else path).suffix
