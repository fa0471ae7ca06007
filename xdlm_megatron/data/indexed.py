"""Opens and writes Megatron's indexed dataset (PREFIX.bin, PREFIX.idx) and its manifest (PREFIX.json).

The format is Megatron-Core's and so is the reader: this module adds the checks that turn a broken file into
one clear line. Megatron-Core (and with it torch) is imported only when a dataset is opened or written, so
that manifests and tokenizer processes stay light.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from xdlm_megatron.data.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version 1, dtype code, sequences, document bounds
REMAKE = "make it again with tools/preprocess_data.py"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What preprocessing knows of a dataset; PREFIX.json, written last, says that the dataset is whole.

    text_bytes: UTF-8 bytes of the documents' text, so that nats per token become bits per byte.
    skipped: number of input lines left out, by reason. sizes and sha256: {"bin": ..., "idx": ...}.
    arguments: the options of the command that made it. prompt_tokens and prompt_bytes: of the prompts, which
    the other figures count too; None where documents have none.
    """

    documents: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    mask_id: int
    eod_id: int | None
    append_eod: bool
    dtype: str
    skipped: dict[str, int]
    sizes: dict[str, int]
    sha256: dict[str, str]
    arguments: dict[str, Any]
    prompt_tokens: int | None = None
    prompt_bytes: int | None = None

    def scored_bytes_per_token(self, clean_prompts: bool) -> float:
        """UTF-8 bytes of text for each token that the loss counts."""
        if not clean_prompts:
            return self.bytes_per_token
        return (self.text_bytes - (self.prompt_bytes or 0)) / (self.tokens - (self.prompt_tokens or 0))

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON and waits until the disk has it."""
        with path.open("w") as stream:
            stream.write(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def load_manifest(prefix: str | Path) -> Manifest:
    """Reads PREFIX.json. Raises DataError where it is missing or does not fit."""
    path = Path(f"{prefix}.json")
    try:
        fields = json.loads(path.read_text())
        return Manifest(**fields)
    except FileNotFoundError:
        raise DataError(f"{path}: no such manifest; is the prefix right? If so, {REMAKE}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a manifest of this version ({error}); {REMAKE}") from error


def open_indexed(prefix: str | Path) -> IndexedDataset:
    """Opens PREFIX.bin and PREFIX.idx by Megatron-Core's reader, memory-mapped.

    Raises DataError where a file is missing, empty, cut short, of another format, or does not fit the other.
    """
    _check_files(str(prefix))
    dataset = megatron_indexed().IndexedDataset(str(prefix), multimodal=False, mmap=True)
    _check_pointers(str(prefix), dataset)
    return dataset


def megatron_indexed() -> ModuleType:
    """megatron.core.datasets.indexed_dataset, imported late and without needless warnings."""
    with warnings.catch_warnings():
        # All of megatron.core comes along and says that it will train without Transformer Engine or apex.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


def dtype_for(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Megatron's rule for the ids' type on disk: two bytes an id where they suffice."""
    return np.uint16 if vocab_size < 65500 else np.int32


def _check_files(prefix: str) -> None:
    """Sizes and header, before Megatron-Core maps the files and fails less clearly."""
    for path in (f"{prefix}.bin", f"{prefix}.idx"):
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file; give the dataset's path without .bin/.idx, or {REMAKE}")
    index_size = os.path.getsize(f"{prefix}.idx")
    with open(f"{prefix}.idx", "rb") as stream:
        head = stream.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise DataError(f"{prefix}.idx begins with {head[:9]!r}, not with Megatron's {MAGIC!r}; {REMAKE}")
    if len(head) < HEADER.size:
        raise DataError(
            f"{prefix}.idx is cut short: {index_size} bytes of a header of {HEADER.size}; {REMAKE}"
        )
    _, version, code, num_sequences, num_bounds = HEADER.unpack(head)
    if version != 1 or not 1 <= code <= 8:
        raise DataError(
            f"{prefix}.idx has version {version}, dtype code {code}; known: 1 and 1 to 8; {REMAKE}"
        )
    expected = (
        HEADER.size + 12 * num_sequences + 8 * num_bounds
    )  # int32 lengths, int64 pointers, int64 bounds
    if index_size < expected:
        raise DataError(f"{prefix}.idx is cut short: {index_size} bytes of {expected}; {REMAKE}")
    if num_sequences == 0 or os.path.getsize(f"{prefix}.bin") == 0:
        raise DataError(f"{prefix} is empty: {num_sequences} documents; {REMAKE} from text that has some")


def _check_pointers(prefix: str, dataset: IndexedDataset) -> None:
    """The documents must lie one after another and fill the .bin: packing reads straight across them."""
    lengths = dataset.sequence_lengths.astype(np.int64) * np.dtype(dataset.index.dtype).itemsize
    ends = np.cumsum(lengths)
    size = os.path.getsize(f"{prefix}.bin")
    if size != ends[-1]:
        state = "is cut short" if size < ends[-1] else "does not belong to its .idx"
        raise DataError(f"{prefix}.bin {state}: {size} bytes, the index counts {ends[-1]}; {REMAKE}")
    if not np.array_equal(dataset.index.sequence_pointers, ends - lengths):
        raise DataError(
            f"{prefix}.idx points to documents out of order; merge with IndexedDatasetBuilder.add_index"
        )
    bounds = dataset.document_indices
    if bounds[0] != 0 or bounds[-1] != len(lengths) or (np.diff(bounds) < 0).any():
        raise DataError(f"{prefix}.idx has document bounds that do not cover its sequences; {REMAKE}")
