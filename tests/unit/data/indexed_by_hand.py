"""Writes Megatron's indexed dataset from its description, independent of Megatron-Core."""

import struct
from itertools import chain
from pathlib import Path

import numpy as np


def write_indexed(
    prefix: Path, sequences: list[list[int]], order: list[int] | None = None, per_document: int = 1
) -> None:
    """uint16 ids; `order` permutes the pointers; a document is `per_document` sequences."""
    lengths = [len(sequence) for sequence in sequences]
    bounds = np.arange(0, len(sequences) + 1, per_document, dtype="<i8")
    starts = [2 * sum(lengths[:n]) for n in range(len(lengths))]
    pointers = [starts[n] for n in order] if order else starts
    Path(f"{prefix}.bin").write_bytes(np.array(list(chain.from_iterable(sequences)), dtype="<u2").tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, len(sequences), len(bounds))
        + np.array(lengths, dtype="<i4").tobytes()
        + np.array(pointers, dtype="<i8").tobytes()
        + bounds.tobytes()
    )
