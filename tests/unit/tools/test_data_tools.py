"""The data tools as a user runs them: one process each, with real files, good and bad."""

import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xdlm_megatron.data.indexed import load_manifest
from xdlm_megatron.data.packing import PackedDataset
from xdlm_megatron.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
CORPUS = ROOT / "examples/data/shakespeare.jsonl.xz"


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"tools/{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def check_error(done: subprocess.CompletedProcess[str], name: str, *words: str) -> None:
    """Exit status 2 and one line that says it."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{name}: error: ")
    for word in words:
        assert word in done.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 60 documents of the bundle, packed likewise."""
    path = tmp_path_factory.mktemp("corpus") / "some.jsonl.xz"
    with lzma.open(CORPUS) as stream:
        path.write_bytes(lzma.compress(b"".join(stream.readline() for _ in range(60)), preset=0))
    return path


@pytest.fixture(scope="module")
def model(corpus: Path) -> Path:
    path = corpus.with_name("some.model")
    done = tool("train_tokenizer", "--input", corpus, "--vocab-size", 512, "--output", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "SentencePiece is quiet"
    assert "vocab_size 512, mask_id 2, eod_id 1" in done.stdout
    return path


def test_from_text_to_samples(corpus: Path, model: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "new/data"
    flags = ("--input", corpus, "--tokenizer", model, "--output", prefix, "--workers", 2)
    done = tool("preprocess_data", *flags, "--valid-fraction", 0.2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    train, valid = load_manifest(prefix), load_manifest(f"{prefix}_valid")
    assert train.documents + valid.documents == 60
    for made in (train, valid):
        assert (
            f"{made.documents:,} documents, {made.tokens:,} tokens, {made.bytes_per_token:.3f}" in done.stdout
        )
    first = load_tokenizer(model).decode(PackedDataset(prefix, 64)[0])
    with lzma.open(corpus, "rt") as stream:
        assert any(json.loads(line)["text"].startswith(first[:50]) for line in stream)


def test_the_same_command_gives_the_same_tokenizer(corpus: Path, model: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere.model"
    assert tool("train_tokenizer", "--input", corpus, "--vocab-size", 512, "--output", again).returncode == 0
    assert again.read_bytes() == model.read_bytes()


def test_bad_lines_are_reported(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed.jsonl").write_bytes(b'{"text": "To be"}\n{"text": 3}\n\xff\n{"text": "or not"}')
    source, prefix = tmp_path / "mixed.jsonl", tmp_path / "data"
    done = tool("preprocess_data", "--input", source, "--tokenizer", model, "--output", prefix)
    assert done.returncode == 0, done.stderr
    assert f"skipped 1 x 'text' is not a string ({source}:2)" in done.stdout
    assert f"skipped 1 x not UTF-8 ({source}:3)" in done.stdout
    assert load_manifest(prefix).documents == 2


BAD_INPUTS = {
    "missing": (None, "no such file"),
    "empty.jsonl": (b"", "no document found"),
    "no-key.jsonl": (b'{"body": "x"}\n' * 5, "5 x no key 'text'"),
    "not-json.jsonl": (b"hello\n", "1 x not JSON"),
    "array.json": (b'[{"text": "x"}]', "not a JSON object"),
    "cut.jsonl.gz": (b"\x1f\x8b\x08", "damaged or not gz"),
    "cut.jsonl.xz": (b"\xfd7zXZ\x00", "damaged or not xz"),
    "table.csv": (b"text\nx\n", "unknown kind of file"),
    "latin.txt": (b"na\xefve", "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line(name: str, model: Path, tmp_path: Path) -> None:
    content, words = BAD_INPUTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    prefix = tmp_path / "out/data"
    done = tool("preprocess_data", "--input", tmp_path / name, "--tokenizer", model, "--output", prefix)
    check_error(done, "preprocess_data", words.removeprefix("5 x ").removeprefix("1 x "), name)
    assert not prefix.parent.exists() or list(prefix.parent.iterdir()) == []


def test_bad_tokenizer_and_existing_output(corpus: Path, model: Path, tmp_path: Path) -> None:
    flags = ("--input", corpus, "--output", tmp_path / "data")
    (tmp_path / "bad.model").write_text("not a model")
    done = tool("preprocess_data", *flags, "--tokenizer", tmp_path / "bad.model")
    check_error(done, "preprocess_data", "bad.model is not a SentencePiece model", "train_tokenizer.py")
    (tmp_path / "data.idx").write_text("mine")
    done = tool("preprocess_data", *flags, "--tokenizer", model)
    check_error(done, "preprocess_data", "data.idx exists already", "--overwrite")
    assert (tmp_path / "data.idx").read_text() == "mine"


def test_train_tokenizer_errors_are_one_line(corpus: Path, model: Path, tmp_path: Path) -> None:
    def train(*flags: object) -> subprocess.CompletedProcess[str]:
        return tool("train_tokenizer", *flags)

    new = tmp_path / "new.model"
    (tmp_path / "bad.jsonl").write_text("x\n")
    for done, words in (
        (train("--input", corpus, "--vocab-size", 10**6, "--output", new), "Vocabulary size too high"),
        (train("--input", corpus, "--vocab-size", 300, "--output", model), "exists already"),
        (
            train("--input", corpus, "--vocab-size", 300, "--output", tmp_path / "new.json"),
            "must end in .model",
        ),
        (
            train("--input", tmp_path / "bad.jsonl", "--vocab-size", 300, "--output", new),
            "bad.jsonl:1: not JSON",
        ),
    ):
        check_error(done, "train_tokenizer", words)
    assert not new.exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(kind: signal.Signals, model: Path, tmp_path: Path) -> None:
    source, folder = tmp_path / "slow.jsonl", tmp_path / "out"
    os.mkfifo(source)  # a file that never ends
    command = [
        sys.executable,
        str(ROOT / "tools/preprocess_data.py"),
        "--input",
        source,
        "--output",
        folder / "data",
    ]
    process = subprocess.Popen(
        [*command, "--tokenizer", model, "--workers", "1"], stderr=subprocess.PIPE, text=True
    )
    keep_open = os.open(source, os.O_RDWR)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob(".data-*")):  # it is at work
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=120)
    finally:
        os.close(keep_open)
        process.kill()
    assert process.returncode == 130
    assert errors == "preprocess_data: interrupted; nothing was written\n"
    assert list(folder.iterdir()) == []
