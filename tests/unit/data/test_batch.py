"""A noised batch is a function of sample ids: the same bits whatever the cut, the order and the company."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from indexed_by_hand import write_indexed

from xdlm_megatron.data.batch import Batch, DocumentRules, NoisedSamples
from xdlm_megatron.data.packing import PADDING, PackedDataset, PaddedDataset
from xdlm_megatron.data.sampler import ShuffledIndex, micro_batch_ids, micro_batch_slots
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear

V, MASK, S, SEED, T_MIN = 50, 49, 9, 11, 0.01
TRAINING = (Stream.TIME, Stream.NOISE)
EVALUATION = (Stream.EVAL_TIME, Stream.EVAL_NOISE)
WHOLE = slice(None)
FIELDS = ("x0_BS", "zt_BS", "t_BS", "alpha_BS", "beta_BS", "dalpha_BS", "scored_BS")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> NoisedSamples:
    prefix = tmp_path_factory.mktemp("batch") / "data"
    rng = np.random.default_rng(0)
    write_indexed(prefix, [rng.integers(0, V - 1, size=40).tolist() for _ in range(10)])
    dataset = PackedDataset(prefix, S)
    return NoisedSamples(
        dataset=dataset,
        index=ShuffledIndex(len(dataset), SEED),
        noise=StationaryNoise(0.3, V, MASK),
        schedule=LogLinear(),
        seed=SEED,
        t_min=T_MIN,
        streams=TRAINING,
        device=torch.device("cpu"),
    )


def with_streams(samples: NoisedSamples, streams: tuple[Stream, Stream], seed: int = SEED) -> NoisedSamples:
    fields = {name: getattr(samples, name) for name in NoisedSamples.__dataclass_fields__}
    return NoisedSamples(**{**fields, "streams": streams, "seed": seed})


def bits(batch: Batch, row: int) -> bytes:
    return b"".join(getattr(batch, name)[row].numpy().tobytes() for name in FIELDS)


@pytest.mark.parametrize(
    ("micro_batch_size", "data_parallel_size"), [(1, 1), (4, 1), (2, 3), (12, 1), (1, 12)]
)
def test_the_cut_changes_no_bit(
    samples: NoisedSamples, micro_batch_size: int, data_parallel_size: int
) -> None:
    """A global batch of 12 that begins at sample 100, in all ways to share it out."""
    whole = samples.build(np.arange(100, 112), np.arange(12), 12)
    seen = set()
    for rank in range(data_parallel_size):
        for index in range(12 // micro_batch_size // data_parallel_size):
            place = (index, micro_batch_size, rank, data_parallel_size)
            ids = micro_batch_ids(100, *place)
            batch = samples.build(ids, micro_batch_slots(*place), 12)
            for row, sample_id in enumerate(ids):
                assert bits(batch, row) == bits(whole, int(sample_id) - 100)
                seen.add(int(sample_id))
    assert seen == set(range(100, 112))


def test_the_order_changes_no_bit(samples: NoisedSamples) -> None:
    order = np.random.default_rng(1).permutation(12)
    whole = samples.build(np.arange(12), np.arange(12), 12)
    shuffled = samples.build(order, order, 12)
    assert [bits(shuffled, row) for row in range(12)] == [bits(whole, int(i)) for i in order]


def test_a_row_is_noised_as_the_noise_module_says(samples: NoisedSamples) -> None:
    """Each token by itself, from its own counter, at the alpha of its row's time."""
    batch = samples.build(np.arange(20, 24), np.arange(4), 4)
    rows = samples.index.rows(np.arange(20, 24))
    for b in range(4):
        assert batch.x0_BS[b].tolist() == samples.dataset[int(rows[b])].tolist()
        assert (batch.t_BS[b] == batch.t_BS[b, 0]).all()
        assert (batch.alpha_BS[b] == 1 - 0.999 * batch.t_BS[b]).all()
        assert (batch.beta_BS[b] == 0.999 * batch.t_BS[b]).all()
        assert (batch.dalpha_BS[b] == -0.999).all()
        for s in range(S):
            counter = (torch.tensor(20 + b), torch.tensor(s))
            z = samples.noise.corrupt(batch.x0_BS[b, s], batch.alpha_BS[b, s], (SEED, Stream.NOISE), counter)
            assert z == batch.zt_BS[b, s]


def test_times_fall_one_in_each_stratum(samples: NoisedSamples) -> None:
    for start in (0, 64, 128):
        batch = samples.build(np.arange(start, start + 64), np.arange(64), 64)
        u = ((batch.t_BS[:, 0] - T_MIN) / (1 - T_MIN) * 64).sort().values
        assert u.floor().tolist() == list(range(64))
        assert 0.2 < (u - u.floor()).std() < 0.4, "anywhere in its stratum"


def test_an_epoch_later_the_same_row_has_other_noise(samples: NoisedSamples) -> None:
    num_rows = len(samples.dataset)
    first = samples.build(np.arange(num_rows), np.arange(num_rows), num_rows)
    second = samples.build(np.arange(num_rows, 2 * num_rows), np.arange(num_rows), num_rows)
    assert sorted(first.x0_BS.tolist()) == sorted(second.x0_BS.tolist())
    assert (first.t_BS != second.t_BS).all()


@pytest.mark.parametrize(
    ("streams", "seed"), [(EVALUATION, SEED), (TRAINING, SEED + 1)], ids=["evaluation", "another seed"]
)
def test_other_streams_are_independent(
    samples: NoisedSamples, streams: tuple[Stream, Stream], seed: int
) -> None:
    """Neither the times nor which tokens are hit have to do with training's, at the very same sample ids."""
    n = 4000
    ids, slots = np.arange(n), np.zeros(n, dtype=np.int64)  # each in a batch of its own: no stratification
    mine = samples.build(ids, slots, 1)
    other = with_streams(samples, streams, seed).build(ids, slots, 1)
    assert torch.equal(mine.x0_BS, other.x0_BS)
    bound = 4 / n**0.5
    assert abs(torch.corrcoef(torch.stack([mine.t_BS[:, 0], other.t_BS[:, 0]]))[0, 1]) < bound
    hits = [(batch.zt_BS != batch.x0_BS).double() - batch.beta_BS for batch in (mine, other)]
    assert abs(torch.corrcoef(torch.stack([hit.flatten() for hit in hits]))[0, 1]) < bound


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of 300 documents of 0 to 3 prompt ids and 1 to 4 others."""
    prefix = tmp_path_factory.mktemp("prompted") / "data"
    rng = np.random.default_rng(1)
    sizes = [rng.integers(0, 4) if n % 2 == 0 else rng.integers(1, 5) for n in range(600)]
    write_indexed(prefix, [rng.integers(0, V - 1, size=n).tolist() for n in sizes], per_document=2)
    return prefix


def with_rules(
    samples: NoisedSamples, dataset: PackedDataset | PaddedDataset, positions: slice = WHOLE, **rules: object
) -> NoisedSamples:
    index = ShuffledIndex(len(dataset), SEED)
    return dataclasses.replace(
        samples, dataset=dataset, index=index, positions=positions, rules=DocumentRules(**rules)
    )


ALL_RULES = {
    "separate": True,
    "time_per_document": True,
    "clean_prompts": True,
    "random_length_fraction": 0.4,
}


def test_prompts_and_padding_are_clean_and_unscored(samples: NoisedSamples, prompted: Path) -> None:
    dataset = PaddedDataset(prompted, S)
    marked = with_rules(samples, dataset, separate=True, clean_prompts=True)
    plain = with_rules(samples, dataset)
    ids = np.arange(200)
    batch, everything = marked.build(ids, ids, 200), plain.build(ids, ids, 200)
    rows = marked.index.rows(ids)
    padding = torch.from_numpy(np.stack([dataset.documents(int(row)) for row in rows])) == PADDING
    prompts = torch.from_numpy(np.stack([dataset.prompts(int(row)) for row in rows]))
    assert padding.any()
    assert prompts.any()
    assert torch.equal(batch.scored_BS, ~(padding | prompts))
    assert torch.equal(batch.x0_BS, everything.x0_BS)
    assert torch.equal(batch.zt_BS, torch.where(batch.scored_BS, everything.zt_BS, everything.x0_BS))
    assert torch.equal(batch.dalpha_BS, torch.where(batch.scored_BS, everything.dalpha_BS, 0.0))
    assert everything.scored_BS.all()
    assert everything.document_BT is None


def test_each_document_has_a_time_of_its_own(samples: NoisedSamples, prompted: Path) -> None:
    """Uniform over the range, the first one's stratified over the batch, neighbours unalike."""
    marked = with_rules(samples, PackedDataset(prompted, 60), separate=True, time_per_document=True)
    n = len(marked.dataset)
    batch = marked.build(np.arange(n), np.arange(n), n)
    first = ((batch.t_BS[:, 0] - T_MIN) / (1 - T_MIN) * n).sort().values
    assert first.floor().tolist() == list(range(n))
    seen = []
    for t_S, document_S in zip(batch.t_BS, batch.document_BT, strict=True):
        times = [t_S[document_S == d].unique() for d in range(int(document_S.max()) + 1)]
        assert all(len(t) == 1 for t in times), "one document, one time"
        assert len({t.item() for t in times}) == len(times)
        seen += [t.item() for t in times]
    u = (torch.tensor(seen).sort().values - T_MIN) / (1 - T_MIN)
    assert len(seen) > 10 * n
    assert (u - torch.linspace(0, 1, len(u))).abs().max() < 1.5 / len(u) ** 0.5  # Kolmogorov
    assert torch.equal(batch.alpha_BS, marked.schedule.alpha(batch.t_BS))
    assert torch.equal(batch.beta_BS, marked.schedule.beta(batch.t_BS))


def test_some_samples_are_cut_to_a_random_length(samples: NoisedSamples) -> None:
    fraction, n = 0.3, 3000
    cut = with_rules(samples, samples.dataset, random_length_fraction=fraction)
    batch = cut.build(np.arange(n), np.arange(n), n)
    length_B = batch.scored_BS.sum(dim=1)
    assert torch.equal(batch.scored_BS, torch.arange(S) < length_B[:, None])
    assert torch.equal(batch.document_BT != PADDING, batch.scored_BS)
    counts = torch.bincount(length_B, minlength=S + 1).double()
    expected = torch.full((S + 1,), fraction * n / S, dtype=torch.float64)
    expected[0], expected[S] = 0, n * (1 - fraction + fraction / S)
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 1e-9).all()
    whole = samples.build(np.arange(n), np.arange(n), n)
    assert torch.equal(batch.zt_BS, torch.where(batch.scored_BS, whole.zt_BS, whole.x0_BS))
    uncut = [i for i in range(n) if length_B[i] == S]
    assert cut.build(np.array(uncut[:4]), np.arange(4), 4).document_BT is None, "nothing to keep apart"


def test_slices_and_cuts_of_marked_samples_change_no_bit(samples: NoisedSamples, prompted: Path) -> None:
    dataset = PackedDataset(prompted, 12)
    whole = with_rules(samples, dataset, **ALL_RULES).build(np.arange(40), np.arange(40), 40)
    for ids in (np.arange(40), np.array([7]), np.array([30, 3])):
        for positions in (slice(0, 6), slice(6, 12), slice(3, 6)):
            batch = with_rules(samples, dataset, positions, **ALL_RULES).build(ids, ids, 40)
            for name in FIELDS:
                assert torch.equal(getattr(batch, name), getattr(whole, name)[ids][:, positions]), name
            assert torch.equal(batch.document_BT, whole.document_BT[ids]), (
                "attention looks at all of a sample"
            )
