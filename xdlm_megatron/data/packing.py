"""Packs documents into samples of one length, unshifted: a denoiser's input and target are the same ids."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.indexed import open_indexed


class PackedDataset:
    """The documents end to end, cut every `seq_length` ids; the last incomplete piece is dropped and counted.

    Where preprocessing ended each document with the end-of-document id, the samples show it.
    """

    def __init__(self, prefix: str | Path, seq_length: int) -> None:
        """prefix: path of the dataset without .bin/.idx; seq_length: ids a sample. Raises DataError."""
        if seq_length < 1:
            raise DataError(f"seq_length={seq_length} must be >= 1")
        self.seq_length = seq_length
        self._indexed = open_indexed(prefix)
        self._dtype = self._indexed.index.dtype
        # Place of each document's first id in the whole, and the number of all ids at the end.
        self._starts = np.concatenate([[0], np.cumsum(self._indexed.sequence_lengths, dtype=np.int64)])
        self.num_tokens = int(self._starts[-1])
        self.num_samples = self.num_tokens // seq_length
        self.num_dropped_tokens = self.num_tokens - self.num_samples * seq_length
        if self.num_samples == 0:
            raise DataError(
                f"{prefix} holds {self.num_tokens} tokens, fewer than one sample of seq_length={seq_length}; "
                f"take a seq_length of at most {self.num_tokens}, or more text"
            )

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sample `index` in [0, len): int64 [seq_length]. Raises IndexError outside (negative ids too)."""
        start = self._start(index)
        offset = start * np.dtype(self._dtype).itemsize
        return np.asarray(self._indexed.bin_reader.read(self._dtype, self.seq_length, offset), dtype=np.int64)

    def cu_seqlens(self, index: int) -> NDArray[np.int32]:
        """Bounds of the documents within a sample: int32 [pieces + 1], first 0, last seq_length."""
        start = self._start(index)
        first = np.searchsorted(self._starts, start, side="right")
        last = np.searchsorted(self._starts, start + self.seq_length, side="left")
        inner = self._starts[first:last] - start
        return np.unique(np.concatenate([[0], inner, [self.seq_length]])).astype(np.int32)

    def _start(self, index: int) -> int:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} is not in [0, {self.num_samples})")
        return int(index) * self.seq_length
