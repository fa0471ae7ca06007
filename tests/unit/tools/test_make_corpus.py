import hashlib
import importlib.util
import json
import lzma
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools/make_corpus.py"
CORPUS = ROOT / "examples/data/shakespeare.jsonl.xz"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_corpus", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def works() -> dict[str, list[str]]:
    """The bundled documents by work, each work's in order."""
    found: dict[str, list[str]] = defaultdict(list)
    with lzma.open(CORPUS, "rt") as stream:
        for line in stream:
            record = json.loads(line)
            work, number = record["id"].split("/")
            assert int(number) == len(found[work]), "documents of a work are numbered in order"
            found[work].append(record["text"])
    return found


def test_sums_are_those_of_the_files() -> None:
    sums = dict(
        reversed(line.split()) for line in CORPUS.with_name("shakespeare.sha256").read_text().splitlines()
    )
    packed = CORPUS.read_bytes()
    assert sums["shakespeare.jsonl.xz"] == hashlib.sha256(packed).hexdigest()
    assert sums["shakespeare.jsonl"] == hashlib.sha256(lzma.decompress(packed)).hexdigest()


def test_bundle_is_clean_and_whole(tool: ModuleType, works: dict[str, list[str]]) -> None:
    assert len(works) == 42
    assert sum(map(len, works.values())) == 957
    for work, documents in works.items():
        text = "".join(documents)
        assert tool.split(text) == documents, work
        assert tool.normalise(text.encode(), work) == text, "normalising again changes nothing"
        assert text.isascii()
    assert works["hamlet"][1].startswith("ACT I.\n\nScene I. Elsinore.")
    assert len(works["sonnets"]) == 155  # the title and 154 sonnets


def test_split_loses_nothing(tool: ModuleType) -> None:
    play = [
        "T\n\nSCENE: Rome\n\n",
        "ACT I. SCENE I. A\n\nx\n\n",
        "SCENE II.\n\nI\n\ny\n\n",  # a numeral alone is a heading in poems only
        "ACT II\n\n\nScene 1. B\nz\n",
        "Scene 2\nw\n",
    ]
    assert tool.split("".join(play)) == play
    assert tool.split("I\n\na\nII.\n\nb\nMIX\n") == ["I\n\na\n", "II.\n\nb\nMIX\n"]


def test_foreign_words_are_refused(tool: ModuleType) -> None:
    assert tool.normalise(b"\n\r\na pretext \r\nb\n\n", "x") == "a pretext\nb\n"
    with pytest.raises(ValueError, match="x says 'Gutenberg'"):
        tool.normalise(b"Project Gutenberg's Hamlet", "x")


def test_another_distribution_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz").write_bytes(b"fake")
    for name in ("fake.tar.gz", "none.tar.gz"):
        command = [
            sys.executable,
            str(TOOL),
            str(tmp_path / name),
            "--output",
            str(tmp_path / "out.jsonl.xz"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("make_corpus: error: ")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out.jsonl.xz").exists()
