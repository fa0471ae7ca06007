from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from indexed_by_hand import write_indexed

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.packing import PADDING, PackedDataset, PaddedDataset

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


def labelled(seed: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, rest) of documents, some prompts empty. No two ids are alike: they tell where they stand."""
    rng = np.random.default_rng(seed)
    ids = iter(range(10_000))
    sizes = rng.integers((0, 1), (9, 10), size=(40, 2))
    return [tuple([next(ids) for _ in range(n)] for n in pair) for pair in sizes]


def write_labelled(prefix: Path, documents: list[tuple[list[int], list[int]]]) -> None:
    write_indexed(prefix, list(chain.from_iterable(documents)), per_document=2)


@pytest.mark.parametrize("seq_length", [1, 5, 16, 100])
def test_packed_samples_know_documents_and_prompts(tmp_path: Path, seq_length: int) -> None:
    documents = labelled(seq_length)
    write_labelled(tmp_path / "data", documents)
    owner = {i: n for n, pair in enumerate(documents) for i in chain(*pair)}
    prompts = {i for prompt, _ in documents for i in prompt}
    dataset = PackedDataset(tmp_path / "data", seq_length)
    for n, ids in enumerate(dataset):
        owners = [owner[i] for i in ids.tolist()]
        order = sorted(set(owners))
        assert dataset.documents(n).tolist() == [order.index(o) for o in owners]
        assert dataset.documents(n).dtype == np.int32
        assert dataset.prompts(n).tolist() == [i in prompts for i in ids.tolist()]


def test_documents_of_one_sequence_have_no_prompt(tmp_path: Path) -> None:
    write_indexed(tmp_path / "data", random_documents(3))
    dataset = PackedDataset(tmp_path / "data", 50)
    for n, ids in enumerate(dataset):
        ends = np.concatenate([[0], np.cumsum(ids == EOD)[:-1]])
        assert dataset.documents(n).tolist() == ends.tolist()
        assert not dataset.prompts(n).any()


@pytest.mark.parametrize("seq_length", [3, 8, 20])
def test_padded_samples_hold_one_document_each(tmp_path: Path, seq_length: int) -> None:
    documents = labelled(seq_length)
    write_labelled(tmp_path / "data", documents)
    prompts = {i for prompt, _ in documents for i in prompt}
    flat = [prompt + rest for prompt, rest in documents]
    pieces = [ids[k : k + seq_length] for ids in flat for k in range(0, len(ids), seq_length)]
    whole = [ids for ids in flat if len(ids) <= seq_length]
    for dataset, expected in (
        (PaddedDataset(tmp_path / "data", seq_length), pieces),
        (PaddedDataset(tmp_path / "data", seq_length, whole=True), whole),
    ):
        assert len(dataset) == len(expected)
        for n, ids in enumerate(expected):
            padding = seq_length - len(ids)
            assert dataset[n].tolist() == ids + [0] * padding
            assert dataset.documents(n).tolist() == [0] * len(ids) + [PADDING] * padding
            assert dataset.prompts(n).tolist() == [i in prompts for i in ids] + [False] * padding
        used = sum(map(len, expected))
        assert f"({1 - used / len(expected) / seq_length:.1%} padding" in dataset.summary
    too_long = len(flat) - len(whole)
    assert (f"{too_long} documents too long" in dataset.summary) == (too_long > 0)


def test_padded_bounds(tmp_path: Path) -> None:
    write_indexed(tmp_path / "data", [[2, 3, 4], [], [5, 6]])
    dataset = PaddedDataset(tmp_path / "data", 4)
    assert len(dataset) == 2, "a document without ids is no sample"
    for index in (-1, 2):
        with pytest.raises(IndexError, match=rf"sample {index} is not in \[0, 2\)"):
            dataset[index]
    with pytest.raises(DataError, match="none of its 2 documents fits into seq_length=1; take a longer one"):
        PaddedDataset(tmp_path / "data", 1, whole=True)
