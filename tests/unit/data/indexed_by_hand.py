"""Writes Megatron's indexed dataset from its description, independent of Megatron-Core."""

import struct
from itertools import chain
from pathlib import Path

import numpy as np


def write_indexed(prefix: Path, documents: list[list[int]], order: list[int] | None = None) -> None:
    """uint16 ids; `order` permutes the pointers."""
    lengths = [len(document) for document in documents]
    starts = [2 * sum(lengths[:n]) for n in range(len(lengths))]
    pointers = [starts[n] for n in order] if order else starts
    Path(f"{prefix}.bin").write_bytes(np.array(list(chain.from_iterable(documents)), dtype="<u2").tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, len(documents), len(documents) + 1)
        + np.array(lengths, dtype="<i4").tobytes()
        + np.array(pointers, dtype="<i8").tobytes()
        + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    )
