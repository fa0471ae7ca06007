"""Samples into figures: generative perplexity, only ever beside entropy, repetition and network calls."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.build import build_valid_samples
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.tokenizer import load_tokenizer
from xdlm_megatron.evaluation.mauve import Mauve
from xdlm_megatron.evaluation.quality import Diversity, diversity, low_entropy_share
from xdlm_megatron.evaluation.records import Estimate, mean_of
from xdlm_megatron.evaluation.scorer import Scored, Scorer, score_all

SUSPICIOUS_SHARE = 0.05  # of samples below 99 % of the reference's entropies


@dataclass(frozen=True)
class Texts:
    """Texts with their ids in the model's tokens. calls, steps: of each sample; empty for held-out text.

    made_by: checkpoint, its hash, sampler, its settings, seed; goes into every file of scores.
    """

    ids: list[np.ndarray]
    texts: list[str]
    calls: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    made_by: dict[str, Any] | None = None


def read_samples(path: Path) -> Texts:
    """A file that `sample` wrote. Raises DataError where it is another kind of file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        samples = record.pop("samples")
        return Texts(
            [np.array(each["ids"], dtype=np.int64) for each in samples],
            [str(each["text"]) for each in samples],
            tuple(int(each["network_calls"]) for each in samples),
            tuple(int(each["steps"]) for each in samples),
            record,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no file of samples ({error!r}); give one that `sample` wrote") from None


def held_out_texts(config: RunConfig, number: int) -> Texts:
    """Whole sequences of data.valid_prefix, as many as there are up to a number. Raises DataError."""
    samples, tokenizer = (
        build_valid_samples(config, torch.device("cpu")),
        load_tokenizer(config.data.tokenizer),
    )
    clean = samples.clean(np.arange(samples.index.num_samples))
    ids = list(clean.x0_BS[clean.scored_BS.all(dim=1)][:number].numpy())
    return Texts(ids, [tokenizer.decode(row.tolist()) for row in ids])


@dataclass(frozen=True)
class TextScores:
    """Under the scorer. nats_per_token: its tokens; generative perplexity is the exponential of it."""

    nats_per_token: Estimate
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token.mean)


@dataclass(frozen=True)
class Row:
    """Samples, or the reference. network_calls, steps: means a sample; None of the reference."""

    num_samples: int
    scores: TextScores | None
    diversity: Diversity
    low_entropy: float | None = None
    network_calls: float | None = None
    steps: float | None = None


@dataclass(frozen=True)
class Scores:
    samples: Row
    reference: Row | None
    mauve: Mauve | None = None

    @property
    def warnings(self) -> list[str]:
        """What makes a low perplexity worthless."""
        share = self.samples.low_entropy
        if share is None:
            return ["no held-out text: whether the entropy is low for text of this length is not known"]
        if share <= SUSPICIOUS_SHARE:
            return []
        return [
            f"{share:.0%} of the samples have less entropy than 99 % of the held-out text (usual: 1 %), so a "
            "low perplexity is no merit here"
        ]


def score_samples(
    samples: Texts, reference: Texts | None, scorer: Scorer | None, mauve: Mauve | None = None
) -> Scores:
    """Samples and held-out text by the same means; without a scorer, without perplexities."""
    low = low_entropy_share(samples.ids, reference.ids) if reference else None
    calls, steps = (float(np.mean(each)) for each in (samples.calls, samples.steps))
    return Scores(
        Row(
            len(samples.ids),
            _under(scorer, samples, "samples"),
            diversity(samples.ids),
            low,
            calls,
            steps,
        ),
        reference
        and Row(len(reference.ids), _under(scorer, reference, "held-out text"), diversity(reference.ids)),
    )


def _under(scorer: Scorer | None, texts: Texts, label: str) -> TextScores | None:
    return None if scorer is None else summarise(score_all(scorer, texts.texts, label))


def summarise(scored: Sequence[Scored]) -> TextScores:
    """Over all tokens, with the error over texts."""
    nats, tokens, num_bytes = (
        np.array([getattr(each, name) for each in scored], dtype=float)
        for name in ("nats", "num_tokens", "num_bytes")
    )
    mean = nats.sum() / tokens.sum()
    error = mean_of(((nats - mean * tokens) / tokens.mean()).tolist()).standard_error
    return TextScores(Estimate(float(mean), error), float(nats.sum() / num_bytes.sum() / math.log(2)))


def to_record(samples: Texts, scorer: Scorer | None, found: Scores) -> dict[str, Any]:
    """Everything, for a file of scores."""
    judge = None if scorer is None else {"name": scorer.name, "fingerprint": scorer.fingerprint}
    return {
        "made_by": samples.made_by,
        "scorer": judge,
        "samples": _row_record(found.samples),
        "reference": None if found.reference is None else _row_record(found.reference),
        "mauve": None if found.mauve is None else asdict(found.mauve),
        "warnings": found.warnings,
    }


def _row_record(row: Row) -> dict[str, Any]:
    record = asdict(row)
    record["diversity"]["unigram_entropy"] = row.diversity.unigram_entropy._asdict()
    if row.scores is not None:
        record["scores"]["nats_per_token"] = row.scores.nats_per_token._asdict()
        record["scores"]["perplexity"] = row.scores.perplexity
    return record


def as_table(found: Scores) -> str:
    """For a terminal."""
    heads = ("", "gen ppl", "bits/byte", "entropy", "dist-1", "dist-2", "dist-3", "rep-4", "low H", "calls")
    rows = [("samples", found.samples), *([("reference", found.reference)] if found.reference else [])]
    lines = [heads, *(_cells(name, row) for name, row in rows)]
    table = "\n".join("  ".join(f"{cell:>9}" for cell in line) for line in lines)
    if found.mauve is None:
        return table
    m = found.mauve
    return f"{table}\nMAUVE {m.score:.3f} of {m.num_texts[0]} samples and {m.num_texts[1]} held-out texts"


def _cells(name: str, row: Row) -> tuple[str, ...]:
    d, s = row.diversity, row.scores
    shares = (f"{x:.3f}" for x in (d.distinct_1, d.distinct_2, d.distinct_3, d.repeated_4))
    return (
        name,
        "" if s is None else f"{s.perplexity:.2f}",
        "" if s is None else f"{s.bits_per_byte:.3f}",
        f"{d.unigram_entropy.mean:.3f}",
        *shares,
        "" if row.low_entropy is None else f"{row.low_entropy:.0%}",
        "" if row.network_calls is None else f"{row.network_calls:.4g}",
    )
