"""Results of a study's jobs as rows, one file of rows a kind, and what they are over the seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from xdlm_megatron.checkpoint.reader import step_of
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.study.protocol import Job

AUTOREGRESSIVE = "autoregressive"


@dataclass(frozen=True)
class BoundRow:
    """The strict bound of a checkpoint, an autoregressive model's likelihood; nats per token."""

    model: str
    seed: int
    step: int
    bound: float
    standard_error: float
    bits_per_byte: float
    window: float


@dataclass(frozen=True)
class AccuracyRow:
    """The share of right tokens among those of one kind with t in [t_start, t_end)."""

    model: str
    seed: int
    kind: str
    t_start: float
    t_end: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class SampleRow:
    """A file of samples. num_steps: of the sampler, 0 where it is no setting; calls: of the network, as
    counted. nats, bits_per_byte: under the scorer, NaN without one.
    """

    model: str
    seed: int
    step: int
    sampler: str
    num_steps: int
    calls: float
    nats: float
    bits_per_byte: float
    entropy: float
    distinct_2: float
    repeated_4: float
    low_entropy: float
    parallelism: float
    kendall_tau: float


@dataclass(frozen=True)
class ReferenceRow:
    """Held-out text by the same means."""

    nats: float
    bits_per_byte: float
    entropy: float
    distinct_2: float
    repeated_4: float


@dataclass(frozen=True)
class Results:
    """dynamics_steps: of the samples that every checkpoint has."""

    bounds: list[BoundRow]
    accuracies: list[AccuracyRow]
    samples: list[SampleRow]
    reference: ReferenceRow | None
    scorer: str | None
    dynamics_steps: int


class Interval(NamedTuple):
    """A mean over seeds, and half of its 95 % interval by Student's t; NaN of a single seed."""

    mean: float
    half: float


def model_name(config: RunConfig) -> str:
    """As papers call it."""
    ratio = config.diffusion.uniform_ratio
    if config.model.autoregressive:
        return AUTOREGRESSIVE
    return {0.0: "MDLM (k=0)", 1.0: "UDLM (k=1)"}.get(ratio, f"XDLM k={ratio:g}")


def collect(jobs: Iterable[Job], dynamics_steps: int) -> Results:
    """Of jobs that are done."""
    found = Results([], [], [], None, None, dynamics_steps)
    for job in jobs:
        record = job.read()
        if record is None:
            raise ValueError(f"{job.result} is missing or of another protocol; call the study again")
        name, seed, step = model_name(job.config), job.config.run.seed, step_of(job.checkpoint)
        if job.sampling is None:
            _add_evaluation(found, name, seed, step, record)
        else:
            found.samples.append(_sample_row(name, seed, step, record))
            if found.reference is None and record["reference"]:
                scorer = (record["scorer"] or {}).get("name")
                found = replace(found, reference=_reference_row(record), scorer=scorer)
    return found


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """CSV, a line a row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def over_seeds(values: Sequence[float]) -> Interval:
    """Of one value a seed; NaN of none."""
    number = len(values)
    if number < 2:
        return Interval(float(values[0]) if values else math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(number)
    return Interval(float(np.mean(values)), float(student.ppf(0.975, number - 1)) * error)


def _add_evaluation(found: Results, name: str, seed: int, step: int, record: dict[str, Any]) -> None:
    bound = record["bound"]
    found.bounds.append(
        BoundRow(
            name,
            seed,
            step,
            bound["nats_per_token"],
            _number(bound["standard_error"]),
            _number(bound["bits_per_byte"]),
            record["nelbo_per_token"],
        )
    )
    for each in record["reconstruction"]:
        row = (each[column] for column in ("kind", "t_start", "t_end", "accuracy", "tokens"))
        found.accuracies.append(AccuracyRow(name, seed, *row))


def _sample_row(name: str, seed: int, step: int, record: dict[str, Any]) -> SampleRow:
    made_by, row = record["made_by"], record["samples"]
    sampling, mean = made_by["sampling"], made_by["mean"]
    return SampleRow(
        name,
        seed,
        step,
        sampling["kind"],
        sampling.get("num_steps", 0),
        row["network_calls"],
        *_texts(row),
        _number(row["low_entropy"]),
        _number(mean["parallelism"]),
        _number(mean["kendall_tau"]),
    )


def _reference_row(record: dict[str, Any]) -> ReferenceRow:
    return ReferenceRow(*_texts(record["reference"]))


def _texts(row: dict[str, Any]) -> tuple[float, float, float, float, float]:
    scores, diversity = row["scores"], row["diversity"]
    nats = math.nan if scores is None else scores["nats_per_token"]["mean"]
    bits = math.nan if scores is None else scores["bits_per_byte"]
    entropy = diversity["unigram_entropy"]["mean"]
    return nats, bits, entropy, diversity["distinct_2"], diversity["repeated_4"]


def _number(value: float | None) -> float:
    """Records have null for what is not finite."""
    return math.nan if value is None else value
