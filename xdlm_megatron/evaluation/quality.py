"""Whether samples are text and not the same words again: what stands beside every generative perplexity.

A sampler that loops on a phrase, or draws below temperature 1, has a low perplexity under any language model.
Its entropy, its share of different n-grams and its repetitions give it away; all are of the model's own
tokens, and all depend on the length, so that the reference is held-out text of the same length.

Shape suffix: T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xdlm_megatron.evaluation.records import Estimate, mean_of
from xdlm_megatron.evaluation.text_stats import unigram_entropy

Ids = NDArray[np.int64]
LOW_QUANTILE = 0.01


@dataclass(frozen=True)
class Diversity:
    """unigram_entropy: mean over samples, nats per token. distinct_n: different n-grams of all samples as a
    share of all. repeated_4: mean share of a sample's 4-grams that it had before.
    """

    unigram_entropy: Estimate
    distinct_1: float
    distinct_2: float
    distinct_3: float
    repeated_4: float


def diversity(samples: Sequence[Ids]) -> Diversity:
    """Of samples of one length [T]. Raises ValueError where there is none, or one is too short."""
    if not samples or min(map(len, samples)) < 4:
        raise ValueError("diversity needs samples of at least 4 tokens; draw some, or longer ones")
    repeated = [1 - _num_different([ids_T], 4) / (len(ids_T) - 3) for ids_T in samples]
    distinct = [_num_different(samples, n) / sum(len(ids_T) - n + 1 for ids_T in samples) for n in (1, 2, 3)]
    return Diversity(
        mean_of([unigram_entropy(ids_T) for ids_T in samples]), *distinct, float(np.mean(repeated))
    )


def low_entropy_share(samples: Sequence[Ids], reference: Sequence[Ids]) -> float:
    """Share of samples with less unigram entropy than all but 1 % of the reference: 0.01 of honest ones."""
    usual = [unigram_entropy(ids_T) for ids_T in reference]
    bound = np.quantile(usual, LOW_QUANTILE, method="lower")
    return float(np.mean([unigram_entropy(ids_T) < bound for ids_T in samples]))


def _num_different(samples: Sequence[Ids], n: int) -> int:
    windows = [np.lib.stride_tricks.sliding_window_view(ids_T, n) for ids_T in samples]
    return len(np.unique(np.concatenate(windows), axis=0))
