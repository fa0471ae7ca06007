"""Counter-based randomness: Philox4x32-10 in torch integers.

A draw is a function of (key, counter) and of nothing else: no generator to checkpoint, no order of calls,
the same bits on a CPU and a GPU and under every parallel layout. The key is (seed, stream); the counter
says which sample, position, step and draw is meant.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from enum import IntEnum

import torch
from torch import Tensor

Key = tuple[int, int]
Word = Tensor | int

WORD = 1 << 32
LOW_32_BITS = WORD - 1
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """The second word of a key: what a draw is for. Append only: the numbers decide every run's noise."""

    TIME = 0
    NOISE = 1
    EVAL_TIME = 2
    EVAL_NOISE = 3
    SAMPLE_PRIOR = 4
    SAMPLE_STEP = 5
    LENGTH = 6


def philox(key: Key, counter: tuple[Word, Word, Word, Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for every counter.

    key: two words in [0, 2^32), (seed, stream). counter: four words in [0, 2^32), ints or int64 tensors
    that broadcast. Returns four int64 tensors of the broadcast shape, each in [0, 2^32). Raises ValueError
    on a bad key.
    """
    k0, k1 = (int(word) for word in key)
    for name, word in (("seed", k0), ("stream", k1)):
        if not 0 <= word < WORD:
            raise ValueError(f"{name}={word} must be in [0, 2^32) = [0, {WORD}); e.g. {word % WORD}")
    device = next((word.device for word in counter if isinstance(word, Tensor)), torch.device("cpu"))
    words = [torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter]
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    for _ in range(ROUNDS):
        # The 64-bit products wrap around in int64; masking after the shift recovers the unsigned halves.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & LOW_32_BITS, (product1 >> 32) & LOW_32_BITS
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & LOW_32_BITS, high0 ^ c3 ^ k1, product0 & LOW_32_BITS
        k0, k1 = (k0 + WEYL[0]) & LOW_32_BITS, (k1 + WEYL[1]) & LOW_32_BITS
    return c0, c1, c2, c3


def uniform(key: Key, counter: tuple[Word, Word, Word, Word]) -> Tensor:
    """float64 in [0, 1) with all 53 bits random, of the counter's broadcast shape."""
    high, low, _, _ = philox(key, counter)
    return unit_interval(high, low)


def unit_interval(high: Tensor, low: Tensor) -> Tensor:
    """Two 32-bit words -> float64 in [0, 1), a multiple of 2^-53: exact, hence the same on every device."""
    return ((high >> 5) * (1 << 26) + (low >> 6)).to(torch.float64) * 2.0**-53


def bounded_int(word: Tensor, n: int) -> Tensor:
    """A 32-bit word -> int64 in [0, n), n <= 2^31. No id is off by more than a relative n / 2^32."""
    return (word * n) >> 32


def split_id(identifier: Tensor) -> tuple[Tensor, Tensor]:
    """A non-negative int64 id -> its (low, high) counter words."""
    identifier = identifier.to(torch.int64)
    return identifier & LOW_32_BITS, identifier >> 32
