"""A noised batch is a function of sample ids: the same bits whatever the cut, the order and the company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from indexed_by_hand import write_indexed

from xdlm_megatron.data.batch import Batch, NoisedSamples
from xdlm_megatron.data.packing import PackedDataset
from xdlm_megatron.data.sampler import ShuffledIndex, micro_batch_ids, micro_batch_slots
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear

V, MASK, S, SEED, T_MIN = 50, 49, 9, 11, 0.01
TRAINING = (Stream.TIME, Stream.NOISE)
EVALUATION = (Stream.EVAL_TIME, Stream.EVAL_NOISE)
FIELDS = ("x0_BS", "zt_BS", "t_B", "alpha_B", "beta_B", "dalpha_B")


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
        assert batch.alpha_B[b] == 1 - 0.999 * batch.t_B[b]
        assert batch.beta_B[b] == 0.999 * batch.t_B[b]
        assert batch.dalpha_B[b] == -0.999
        for s in range(S):
            counter = (torch.tensor(20 + b), torch.tensor(s))
            z = samples.noise.corrupt(batch.x0_BS[b, s], batch.alpha_B[b], (SEED, Stream.NOISE), counter)
            assert z == batch.zt_BS[b, s]


def test_times_fall_one_in_each_stratum(samples: NoisedSamples) -> None:
    for start in (0, 64, 128):
        batch = samples.build(np.arange(start, start + 64), np.arange(64), 64)
        u = ((batch.t_B - T_MIN) / (1 - T_MIN) * 64).sort().values
        assert u.floor().tolist() == list(range(64))
        assert 0.2 < (u - u.floor()).std() < 0.4, "anywhere in its stratum"


def test_an_epoch_later_the_same_row_has_other_noise(samples: NoisedSamples) -> None:
    num_rows = len(samples.dataset)
    first = samples.build(np.arange(num_rows), np.arange(num_rows), num_rows)
    second = samples.build(np.arange(num_rows, 2 * num_rows), np.arange(num_rows), num_rows)
    assert sorted(first.x0_BS.tolist()) == sorted(second.x0_BS.tolist())
    assert (first.t_B != second.t_B).all()


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
    assert abs(torch.corrcoef(torch.stack([mine.t_B, other.t_B]))[0, 1]) < bound
    hits = [(batch.zt_BS != batch.x0_BS).double() - batch.beta_B[:, None] for batch in (mine, other)]
    assert abs(torch.corrcoef(torch.stack([hit.flatten() for hit in hits]))[0, 1]) < bound
