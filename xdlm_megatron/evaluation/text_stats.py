"""Statistics of token sequences that a likelihood alone does not tell."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unigram_entropy(ids: NDArray[np.integer]) -> float:
    """Entropy of the token frequencies of `ids`, in nats per token.

    A sampler that loops on one phrase scores low. Compare with a text of the same length: the entropy grows
    with the length.
    """
    counts = np.unique_counts(np.asarray(ids).ravel()).counts
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())
