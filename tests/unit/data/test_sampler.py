import numpy as np
import pytest

from xdlm_megatron.data.sampler import ShuffledIndex, micro_batch_ids, micro_batch_slots


@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (4, 1), (1, 12), (2, 3), (3, 2), (12, 1)])
def test_ranks_and_micro_batches_cover_the_global_batch_once(mbs: int, dp: int) -> None:
    global_batch, consumed = 12, 36
    read = [
        micro_batch_ids(consumed, j, mbs, r, dp) for j in range(global_batch // (mbs * dp)) for r in range(dp)
    ]
    assert all(ids.dtype == np.int64 and ids.shape == (mbs,) for ids in read)
    # in the order of (micro-batch, rank) the ids are simply in order: no layout changes what a step reads
    assert np.concatenate(read).tolist() == list(range(36, 48))


def test_known_ids() -> None:
    assert micro_batch_ids(100, 1, 2, 2, 3).tolist() == [110, 111]  # 100 + 1*(2*3) + 2*2 + {0, 1}
    assert micro_batch_slots(1, 2, 2, 3).tolist() == [10, 11]
    assert micro_batch_ids(2**40, 0, 1, 0, 1).tolist() == [2**40]


@pytest.mark.parametrize(
    "arguments", [(-1, 0, 1, 0, 1), (0, -1, 1, 0, 1), (0, 0, 0, 0, 1), (0, 0, 1, 2, 2), (0, 0, 1, -1, 2)]
)
def test_senseless_places_raise(arguments: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        micro_batch_ids(*arguments)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000])
def test_every_row_once_an_epoch(num_samples: int) -> None:
    index = ShuffledIndex(num_samples, seed=5)
    for epoch in range(3):
        ids = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
        assert sorted(index.rows(ids)) == list(range(num_samples))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    index = ShuffledIndex(500, seed=1)
    first = index.order(0).copy()
    second = index.order(1).copy()
    assert np.array_equal(index.order(0), first), "going back gives the same again"
    assert np.array_equal(ShuffledIndex(500, seed=1).order(1), second), "and a fresh index may begin anywhere"
    assert not np.array_equal(first, second)
    assert not np.array_equal(ShuffledIndex(500, seed=2).order(0), first)
    assert index.row(3 * 500 + 17) == ShuffledIndex(500, seed=1).order(3)[17]


def test_order_never_changes_between_versions() -> None:
    # A run resumed under another NumPy must read the same rows.
    assert ShuffledIndex(10, seed=1234).rows(np.arange(12)).tolist() == GOLDEN


def test_order_looks_random() -> None:
    """Neither the place of a row nor the distance of neighbours is biased (5 sigma)."""
    n, epochs = 100, 400
    index = ShuffledIndex(n, seed=9)
    orders = np.stack([index.order(e) for e in range(epochs)]).astype(float)
    sigma = np.sqrt((n**2 - 1) / 12 / epochs)
    assert np.abs(orders.mean(axis=0) - (n - 1) / 2).max() < 5 * sigma
    steps = np.abs(np.diff(orders, axis=1)).mean()
    assert abs(steps - (n + 1) / 3) < 1  # mean distance of two distinct rows


def test_a_batch_may_cross_an_epoch() -> None:
    index = ShuffledIndex(7, seed=3)
    rows = index.rows(np.array([[5, 6], [7, 8]]))
    assert rows.shape == (2, 2)
    assert rows.ravel().tolist() == [*index.order(0)[5:], *index.order(1)[:2]]


def test_bounds() -> None:
    ShuffledIndex(1, seed=2**32 - 1).row(10**15)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed={seed} must lie in \[0, 2\*\*32\)"):
            ShuffledIndex(1, seed)
    with pytest.raises(ValueError, match="num_samples=0"):
        ShuffledIndex(0, 1)
    with pytest.raises(ValueError, match="sample_id=-1"):
        ShuffledIndex(3, 1).row(-1)


GOLDEN = [8, 9, 7, 3, 0, 1, 4, 2, 5, 6, 0, 9]
