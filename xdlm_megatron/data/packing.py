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
        self.num_tokens = int(self._indexed.sequence_lengths.sum(dtype=np.int64))
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
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} is not in [0, {self.num_samples})")
        offset = int(index) * self.seq_length * np.dtype(self._dtype).itemsize
        return np.asarray(self._indexed.bin_reader.read(self._dtype, self.seq_length, offset), dtype=np.int64)
