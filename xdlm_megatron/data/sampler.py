"""Which samples a data-parallel rank reads, as pure functions of `consumed_samples`.

A sample id is a place in the global training order: 0, 1, 2, ... without end. The id alone decides what
noise a sample gets and, through `ShuffledIndex`, which row of the dataset it shows. There is no iterator to
save: a run resumes from one number, under any data-parallel size.
"""

import math

import numpy as np
from numpy.typing import NDArray


def micro_batch_slots(
    micro_batch_index: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> NDArray[np.int64]:
    """Places within the global batch that a rank's micro-batch holds: int64 [micro_batch_size].

    The ranks read side by side: micro-batch j of all ranks covers j*mbs*dp ... (j+1)*mbs*dp - 1. Stratified
    noise times are indexed by these numbers.
    """
    if micro_batch_index < 0 or micro_batch_size < 1:
        raise ValueError(
            f"micro_batch_index={micro_batch_index} must be >= 0 and micro_batch_size={micro_batch_size} >= 1"
        )
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(
            f"data_parallel_rank={data_parallel_rank} must lie in [0, data_parallel_size) = "
            f"[0, {data_parallel_size})"
        )
    start = (micro_batch_index * data_parallel_size + data_parallel_rank) * micro_batch_size
    return start + np.arange(micro_batch_size, dtype=np.int64)


def micro_batch_ids(
    consumed_samples: int,
    micro_batch_index: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> NDArray[np.int64]:
    """Global sample ids of a rank's micro-batch, int64 [micro_batch_size]; the batch starts at consumed."""
    if consumed_samples < 0:
        raise ValueError(f"consumed_samples={consumed_samples} must be >= 0")
    slots = micro_batch_slots(micro_batch_index, micro_batch_size, data_parallel_rank, data_parallel_size)
    return consumed_samples + slots


class SpreadIndex:
    """`num_samples` rows spread evenly over the dataset, each once a cycle and every cycle alike.

    Steps of the golden ratio (made coprime to the number of rows) pick and order them. Held-out samples stand
    at noise times in this order, so that neighbouring times meet unrelated text.
    """

    def __init__(self, num_samples: int, num_rows: int) -> None:
        """num_samples: at most num_rows."""
        self.num_samples = num_samples
        self._num_rows = num_rows
        self._step = round(num_rows * (math.sqrt(5) - 1) / 2) or 1
        while math.gcd(self._step, num_rows) > 1:
            self._step += 1

    def rows(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of many ids, int64 of the same shape."""
        return sample_ids % self.num_samples * self._step % self._num_rows


class ShuffledIndex:
    """Maps global sample ids to rows of a dataset: every row once an epoch, each epoch in its own order.

    The order is a pure function of (seed, epoch). It sorts the raw 64-bit words of Philox, which NumPy keeps
    from version to version; it does not promise that of `Generator.permutation`, and a resumed run must not
    meet another order. The current epoch's order is kept (4 bytes a row); its making takes 24 more.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        """num_samples: rows of the dataset, >= 1; seed: in [0, 2**32). Raises ValueError."""
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be >= 1: the dataset has no row to show")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} must lie in [0, 2**32)")
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._order: NDArray[np.unsignedinteger] = np.empty(0, dtype=np.uint32)

    def order(self, epoch: int) -> NDArray[np.unsignedinteger]:
        """The rows of an epoch in the order they are read: [num_samples], a permutation."""
        if epoch != self._epoch:
            key = np.array([self.seed, epoch], dtype=np.uint64)
            words = np.random.Philox(key=key).random_raw(self.num_samples)
            small = np.uint32 if self.num_samples <= 2**32 else np.uint64
            # Stable: equal words, however rare, must not leave the order to the sorting algorithm.
            self._order = np.argsort(words, kind="stable").astype(small)
            self._epoch = epoch
        return self._order

    def row(self, sample_id: int) -> int:
        """The dataset row of a global sample id (any int >= 0)."""
        if sample_id < 0:
            raise ValueError(f"sample_id={sample_id} must be >= 0")
        epoch, place = divmod(int(sample_id), self.num_samples)
        return int(self.order(epoch)[place])

    def rows(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of many ids, int64 of the same shape; a batch may run across the end of an epoch."""
        rows = [self.row(int(i)) for i in sample_ids.ravel()]
        return np.array(rows, dtype=np.int64).reshape(sample_ids.shape)
