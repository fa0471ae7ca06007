import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from indexed_by_hand import write_indexed

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.indexed import dtype_for, load_manifest, open_indexed

DOCUMENTS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1]]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_indexed(tmp_path / "data", DOCUMENTS)
    return tmp_path / "data"


def test_reads_what_the_format_says(prefix: Path) -> None:
    dataset = open_indexed(prefix)
    assert [dataset[n].tolist() for n in range(len(dataset))] == DOCUMENTS
    assert dataset.index.dtype is np.uint16


def cut(path: str, size: int) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        file = Path(prefix.with_suffix(path))
        file.write_bytes(file.read_bytes()[:size])

    return damage


def patch(at: int, content: bytes) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        raw = bytearray(prefix.with_suffix(".idx").read_bytes())
        raw[at : at + len(content)] = content
        prefix.with_suffix(".idx").write_bytes(raw)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: p.with_suffix(".bin").unlink(),
            r"data\.bin: no such file; give the dataset's path without",
        ),
        (lambda p: p.with_suffix(".idx").unlink(), r"data\.idx: no such file"),
        (
            cut(".bin", 22),
            r"data\.bin is cut short: 22 bytes, the index counts 24; make it again with tools/",
        ),
        (cut(".bin", 0), r"data is empty"),
        (cut(".idx", 90), r"data\.idx is cut short: 90 bytes of 102"),
        (cut(".idx", 20), r"data\.idx is cut short: 20 bytes of a header of 34"),
        (cut(".idx", 0), r"data\.idx begins with b''"),
        (patch(0, b"TNTIDX\x00"), r"data\.idx begins with b'TNTIDX"),
        (patch(9, b"\x02"), r"version 2, dtype code 8; known: 1 and 1 to 8"),
        (patch(17, b"\x63"), r"version 1, dtype code 99"),
        (lambda p: write_indexed(p, []), r"data is empty: 0 documents"),
        (lambda p: write_indexed(p, DOCUMENTS, [2, 0, 1]), r"points to documents out of order; merge with"),
        (lambda p: p.with_suffix(".bin").write_bytes(b"\0" * 26), r"does not belong to its \.idx: 26 bytes"),
    ],
)
def test_damage_is_named(prefix: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(prefix)
    with pytest.raises(DataError, match=message):
        open_indexed(prefix)


def test_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such manifest; is the prefix right\?"):
        load_manifest(tmp_path / "none")
    for content in ("{", "[]", json.dumps({"documents": 1}), json.dumps({"surprise": 1})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=r"bad\.json is not a manifest of this version"):
            load_manifest(tmp_path / "bad")


def test_dtype_is_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (2, 65499, 65500, 200_000):
        assert dtype_for(vocab_size) is DType.optimal_dtype(vocab_size)


def test_worker_side_imports_no_torch() -> None:
    modules = "encode, documents, tokenizer, packing, sampler, preprocess, train_tokenizer"
    code = f"from xdlm_megatron.data import {modules}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
