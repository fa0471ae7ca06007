"""Counter-based randomness: Philox4x32-10 in torch integers.

A draw is a function of (key, counter) and of nothing else: no generator to checkpoint, no order of calls,
the same bits on a CPU and a GPU and under every parallel layout. The key is (seed, stream); the counter
says which sample, position, step and draw is meant.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import functools
from collections.abc import Callable
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


def wrapping_product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words; its 64 bits wrap around in int64."""
    product = word * multiplier
    return (product >> 32) & LOW_32_BITS, product & LOW_32_BITS


def split_product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The same within 49 bits, for compilers: to C++ an overflow is undefined."""
    below, above = (word & 0xFFFF) * multiplier, (word >> 16) * multiplier
    below = below + ((above & 0xFFFF) << 16)
    return (above >> 16) + (below >> 32), below & LOW_32_BITS


def philox(
    key: Key,
    counter: tuple[Word, Word, Word, Word],
    product: Callable[[Tensor, int], tuple[Tensor, Tensor]] = wrapping_product,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        (high0, low0), (high1, low1) = product(c0, MULTIPLIERS[0]), product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW_32_BITS, (k1 + WEYL[1]) & LOW_32_BITS
    return c0, c1, c2, c3


def compiled_philox() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """philox(key, counter) as one kernel of torch.compile's: the same words."""
    return torch.compile(functools.partial(philox, product=split_product), dynamic=False, fullgraph=True)


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
