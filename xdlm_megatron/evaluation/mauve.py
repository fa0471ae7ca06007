"""MAUVE (Pillutla et al. 2021): samples against held-out text as distributions of features.

By the package mauve-text (extra `mauve`), over features of the offline scorer.

Shape suffixes: N samples, M held-out texts, H features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.evaluation.scorer import CausalScorer

SEED = 25  # of the clustering, the package's own


@dataclass(frozen=True)
class Mauve:
    """score: in (0, 1], 1 for equal distributions; of two sets of num_texts, in num_buckets clusters."""

    score: float
    num_texts: tuple[int, int]
    num_buckets: int


def check_mauve(scorer: Path | None) -> None:
    """Before anything is read: raises DataError where there is no scorer, or the package is missing."""
    if scorer is None:
        raise DataError("--mauve compares features of a scorer; add --scorer FOLDER")
    try:
        import mauve  # noqa: F401
    except ImportError:
        raise DataError("--mauve needs mauve-text; pip install 'xdlm_megatron[mauve]'") from None


def mauve_of(scorer: CausalScorer, samples: Sequence[str], reference: Sequence[str] | None) -> Mauve:
    """Of texts, by the scorer's features. Raises DataError without a reference."""
    if reference is None:
        raise DataError("--mauve compares with held-out text, and the recipe has no data.valid_prefix")
    return compare_features(_features(scorer, samples), _features(scorer, reference))


def compare_features(sample_NH: np.ndarray, reference_MH: np.ndarray) -> Mauve:
    """Features, a row each."""
    from mauve import compute_mauve

    found = compute_mauve(p_features=sample_NH, q_features=reference_MH, seed=SEED)
    return Mauve(float(found.mauve), (len(sample_NH), len(reference_MH)), int(found.num_buckets))


def _features(scorer: CausalScorer, texts: Sequence[str]) -> np.ndarray:
    return np.stack(
        [scorer.features(text) for text in tqdm(texts, desc="features", disable=None, leave=False)]
    )
