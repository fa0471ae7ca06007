from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from indexed_by_hand import write_indexed

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.packing import PackedDataset

EOD = 1


def random_documents(seed: int) -> list[list[int]]:
    """Documents of 1 to 40 ids, each ending with EOD, which occurs nowhere else."""
    rng = np.random.default_rng(seed)
    return [[*rng.integers(2, 60000, size=rng.integers(0, 40)).tolist(), EOD] for _ in range(50)]


@pytest.mark.parametrize("seq_length", [1, 7, 64, 300])
def test_samples_are_the_documents_end_to_end(tmp_path: Path, seq_length: int) -> None:
    documents = random_documents(seq_length)
    write_indexed(tmp_path / "data", documents)
    dataset = PackedDataset(tmp_path / "data", seq_length)
    flat = list(chain.from_iterable(documents))
    assert dataset.num_tokens == len(flat)
    assert len(dataset) == len(flat) // seq_length
    assert dataset.num_dropped_tokens == len(flat) % seq_length
    for n, sample in enumerate(dataset):
        assert sample.dtype == np.int64
        assert sample.tolist() == flat[n * seq_length : (n + 1) * seq_length]


def test_samples_may_be_written_to(tmp_path: Path) -> None:
    write_indexed(tmp_path / "data", [[2, 3, 4, 5]])
    dataset = PackedDataset(tmp_path / "data", 2)
    dataset[0][:] = 0
    assert dataset[0].tolist() == [2, 3]


def test_bounds(tmp_path: Path) -> None:
    write_indexed(tmp_path / "data", [[2, 3, 4], [5, 6]])
    assert len(PackedDataset(tmp_path / "data", 5)) == 1
    dataset = PackedDataset(tmp_path / "data", 2)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=rf"sample {index} is not in \[0, 2\)"):
            dataset[index]
    with pytest.raises(
        DataError, match="holds 5 tokens, fewer than one sample of seq_length=6; take a seq_length"
    ):
        PackedDataset(tmp_path / "data", 6)
    with pytest.raises(DataError, match="seq_length=0"):
        PackedDataset(tmp_path / "data", 0)
