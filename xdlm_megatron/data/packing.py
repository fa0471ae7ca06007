"""Packs documents into samples of one length, unshifted: a denoiser's input and target are the same ids.

A dataset gives three things of a sample, each [seq_length]: its ids, which document each position belongs to,
and which positions are a prompt. Documents are numbered within the sample; PADDING is none.

Shape suffixes: T positions of a sample, D documents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.indexed import open_indexed

PADDING = -1


class Packing(Protocol):
    """Samples of `seq_length` positions; `summary` tells their number and what was left out."""

    seq_length: int

    @property
    def summary(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.int64]: ...

    def documents(self, index: int) -> NDArray[np.int32]: ...

    def prompts(self, index: int) -> NDArray[np.bool_]: ...


class _Flat:
    """All ids of an indexed dataset as one line, with the bounds of its documents.

    A document is one sequence of the index, or several, of which all but the last are its prompt.
    """

    def __init__(self, prefix: str | Path, seq_length: int) -> None:
        if seq_length < 1:
            raise DataError(f"seq_length={seq_length} must be >= 1")
        self._indexed = open_indexed(prefix)
        self._dtype = np.dtype(self._indexed.index.dtype)
        # Both stay on disk, mapped: where a sequence starts, in bytes, and a document, in sequences.
        self._starts = self._indexed.index.sequence_pointers
        self._bounds = self._indexed.index.document_indices
        self.num_tokens = int(self._indexed.sequence_lengths.sum(dtype=np.int64))

    def ids(self, start: int, length: int) -> NDArray[np.int64]:
        offset = start * self._dtype.itemsize
        return np.asarray(self._indexed.bin_reader.read(self._dtype, length, offset), dtype=np.int64)

    def documents(self, start: int, length: int) -> NDArray[np.int64]:
        """The document of each position of [start, start + length), counted through the dataset."""
        return np.searchsorted(self._bounds, self._sequences(start, length), side="right") - 1

    def prompts(self, start: int, length: int) -> NDArray[np.bool_]:
        """Which positions of [start, start + length) belong to their document's prompt."""
        sequences = self._sequences(start, length)
        last = self._bounds[np.searchsorted(self._bounds, sequences, side="right")] - 1
        return np.asarray(sequences < last)

    def document_lengths(self) -> NDArray[np.int64]:
        """[D], prompt and rest together."""
        ends = np.concatenate([[0], np.cumsum(self._indexed.sequence_lengths, dtype=np.int64)])
        return np.diff(ends[self._bounds])

    def _sequences(self, start: int, length: int) -> NDArray[np.int64]:
        size = self._dtype.itemsize
        first = int(np.searchsorted(self._starts, start * size, side="right")) - 1
        end = int(np.searchsorted(self._starts, (start + length) * size, side="left"))
        inner = np.asarray(self._starts[first + 1 : end], dtype=np.int64) // size
        return first + np.searchsorted(inner, np.arange(start, start + length), side="right")


class PackedDataset:
    """The documents end to end, cut every `seq_length` ids; the last incomplete piece is dropped and counted.

    Where preprocessing ended each document with the end-of-document id, the samples show it.
    """

    def __init__(self, prefix: str | Path, seq_length: int) -> None:
        """prefix: path of the dataset without .bin/.idx; seq_length: ids a sample. Raises DataError."""
        self._flat = _Flat(prefix, seq_length)
        self.seq_length = seq_length
        self.num_tokens = self._flat.num_tokens
        self.num_samples = self.num_tokens // seq_length
        self.num_dropped_tokens = self.num_tokens - self.num_samples * seq_length
        if self.num_samples == 0:
            raise DataError(
                f"{prefix} holds {self.num_tokens} tokens, fewer than one sample of seq_length={seq_length}; "
                f"take a seq_length of at most {self.num_tokens}, or more text"
            )

    @property
    def summary(self) -> str:
        return f"{self.num_samples} samples"

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Ids of sample `index` in [0, len), int64 [T]. Raises IndexError outside (negative ids too)."""
        return self._flat.ids(self._start(index), self.seq_length)

    def documents(self, index: int) -> NDArray[np.int32]:
        """0 for the document, or the end of one, that the sample begins with, 1 for the next: int32 [T]."""
        documents_T = self._flat.documents(self._start(index), self.seq_length)
        changes_T = np.diff(documents_T, prepend=documents_T[0]) != 0
        return np.cumsum(changes_T, dtype=np.int32)  # consecutive: documents without ids take no number

    def prompts(self, index: int) -> NDArray[np.bool_]:
        """Which positions belong to a document's prompt: bool [T]."""
        return self._flat.prompts(self._start(index), self.seq_length)

    def _start(self, index: int) -> int:
        _check_index(index, self.num_samples)
        return int(index) * self.seq_length


class PaddedDataset:
    """One document a sample, padded at its end with id 0; a longer one is cut into several samples.

    whole: leave longer ones out and count them, for later pieces would lack their prompt.
    """

    def __init__(self, prefix: str | Path, seq_length: int, whole: bool = False) -> None:
        """prefix: path of the dataset without .bin/.idx; seq_length: positions a sample. Raises DataError."""
        self._flat = _Flat(prefix, seq_length)
        self.seq_length = seq_length
        lengths_D = self._flat.document_lengths()
        starts_D = np.cumsum(lengths_D) - lengths_D
        kept_D = (lengths_D > 0) & ((lengths_D <= seq_length) | (not whole))
        self.num_left_out = int((lengths_D > 0).sum() - kept_D.sum())
        lengths_D, starts_D = lengths_D[kept_D], starts_D[kept_D]
        pieces_D = -(-lengths_D // seq_length)
        piece = np.arange(pieces_D.sum()) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
        self._starts = np.repeat(starts_D, pieces_D) + piece * seq_length
        self._lengths = np.minimum(np.repeat(lengths_D, pieces_D) - piece * seq_length, seq_length)
        if not len(self):
            raise DataError(
                f"{prefix}: none of its {self.num_left_out} documents fits into seq_length={seq_length}; "
                "take a longer one"
            )

    @property
    def summary(self) -> str:
        padding = 1 - self._lengths.sum() / (len(self) * self.seq_length)
        left_out = f", {self.num_left_out} documents too long" if self.num_left_out else ""
        return f"{len(self)} samples ({padding:.1%} padding{left_out})"

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Ids of sample `index` in [0, len), int64 [T]. Raises IndexError outside (negative ids too)."""
        start, length = self._piece(index)
        ids_T = np.zeros(self.seq_length, dtype=np.int64)
        ids_T[:length] = self._flat.ids(start, length)
        return ids_T

    def documents(self, index: int) -> NDArray[np.int32]:
        """0, then PADDING: int32 [T]."""
        documents_T = np.full(self.seq_length, PADDING, dtype=np.int32)
        documents_T[: self._piece(index)[1]] = 0
        return documents_T

    def prompts(self, index: int) -> NDArray[np.bool_]:
        """Which positions belong to the document's prompt: bool [T]."""
        start, length = self._piece(index)
        prompts_T = np.zeros(self.seq_length, dtype=np.bool_)
        prompts_T[:length] = self._flat.prompts(start, length)
        return prompts_T

    def _piece(self, index: int) -> tuple[int, int]:
        _check_index(index, len(self))
        return int(self._starts[index]), int(self._lengths[index])


def _check_index(index: int, num_samples: int) -> None:
    if not 0 <= index < num_samples:
        raise IndexError(f"sample {index} is not in [0, {num_samples})")
