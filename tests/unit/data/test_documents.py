import gzip
import json
import lzma
from pathlib import Path

import pytest

from xdlm_megatron.data.documents import Document, Skip, find_inputs, parse, read_blocks
from xdlm_megatron.data.errors import DataError


def read(*paths: Path, block_bytes: int = 1 << 20, key: str = "text") -> list[Document | Skip]:
    return [item for block in read_blocks(paths, block_bytes) for item in parse(block, key)]


def test_packed_or_not_the_documents_are_the_same(tmp_path: Path) -> None:
    documents = [f"document {n}\nwith naïve text" for n in range(100)]
    raw = "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(raw))
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + raw[:-1])  # a byte-order mark, no newline at the end
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.jsonl"):
        path = tmp_path / name
        items = read(path, block_bytes=300)
        assert [item.texts for item in items] == [(text,) for text in documents]
        assert [item.where for item in items] == [f"{path}:{n}" for n in range(1, 101)]
        blocks = list(read_blocks([path], 300))
        assert len(blocks) > 10
        assert sum(block.disk_bytes for block in blocks) == path.stat().st_size


def test_bad_lines_are_skipped_with_line_and_reason(tmp_path: Path) -> None:
    lines = [
        (b'{"text": "good"}', None),
        (b"", None),  # a blank line is no mistake
        (b"not json", "not JSON"),
        (b'{"text": "cut', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"body": "x"}', "no key 'text'"),
        (b'{"text": null}', "'text' is not a string"),
        (b'{"text": ["x"]}', "'text' is not a string"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": " \\n "}', "empty text"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\\ud83d\\ude00"}', None),
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in lines))
    expected = [Skip(f"{path}:{n}", reason) for n, (_, reason) in enumerate(lines, 1) if reason]
    for block_bytes in (1, 1 << 20):
        items = read(path, block_bytes=block_bytes)
        assert [item for item in items if isinstance(item, Skip)] == expected
        assert [item for item in items if not isinstance(item, Skip)] == [
            Document(f"{path}:1", ("good",)),
            Document(f"{path}:14", ("\U0001f600",)),
        ]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\r\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"\xff")
    items = read(*(tmp_path / name for name in ("a.txt", "b.txt.gz", "c.txt", "d.txt")), block_bytes=1)
    assert [item.texts for item in items if not isinstance(item, Skip)] == [("one\n\ntwo\r\n",), ("three",)]
    assert [item.reason for item in items if isinstance(item, Skip)] == ["empty text", "not UTF-8"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz"])
def test_damaged_archives_are_named(tmp_path: Path, name: str) -> None:
    raw = b"".join(json.dumps({"text": str(n) * 50}).encode() + b"\n" for n in range(5000))
    packed = gzip.compress(raw) if name.endswith("gz") else lzma.compress(raw)
    path = tmp_path / name
    for broken in (packed[:-200], b"plain text", packed[:100] + b"\0" * 50 + packed[150:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=f"{name} is damaged or not {name[-2:]}"):
            read(path)


def test_find_inputs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c[1].txt", "z.csv"):
        (tmp_path / name).write_text("x")
    found = find_inputs([f"{tmp_path}/c[1].txt", f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl"])
    assert [path.name for path in found] == ["c[1].txt", "a.jsonl", "b.jsonl"]
    for pattern, message in (
        (f"{tmp_path}/none*.jsonl", "no such file; give files or globs"),
        (f"{tmp_path}/z.csv", r"unknown kind of file; its name must end in one of \.jsonl"),
        (str(tmp_path), "is a folder; name its files"),
    ):
        with pytest.raises(DataError, match=message):
            find_inputs([pattern])
