"""What `sample` leaves in the run folder: text with all that made it, and traces of the first sample."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from xdlm_megatron.checkpoint.integrity import fingerprint
from xdlm_megatron.config.load import to_tree
from xdlm_megatron.config.samplers import AnySampler
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.tokenizer import Tokenizer
from xdlm_megatron.evaluation.generation import SampleOptions, Samples
from xdlm_megatron.evaluation.order import kendall_tau, parallelism
from xdlm_megatron.evaluation.records import write_record
from xdlm_megatron.evaluation.text_stats import unigram_entropy
from xdlm_megatron.evaluation.trace import draw_trace
from xdlm_megatron.evaluation.trace_page import write_trace_page


def describe_samples(tokenizer: Tokenizer, observed_S: Tensor, samples: Samples) -> list[dict[str, Any]]:
    """A record of each sample: text, ids, network calls, steps, entropy, parallelism and order."""
    free_S = (observed_S < 0).cpu().numpy()
    columns = (samples.ids, samples.last_change, samples.evaluations, samples.steps)
    records = []
    for ids, changed, calls, steps in zip(*(column.cpu().numpy() for column in columns), strict=True):
        records.append(
            {
                "text": tokenizer.decode(ids.tolist()),
                "network_calls": int(calls),
                "steps": int(steps),
                "unigram_entropy": unigram_entropy(ids),
                "parallelism": parallelism(free_S, int(steps)),
                "kendall_tau": kendall_tau(changed, free_S),
                "ids": ids.tolist(),
                "last_change": changed.tolist(),
            }
        )
    return records


def mean_of(records: list[dict[str, Any]], name: str) -> float:
    """Over the samples that have the number; NaN where none does."""
    values = [record[name] for record in records if math.isfinite(record[name])]
    return sum(values) / len(values) if values else math.nan


def samples_name(settings: AnySampler, seed: int) -> str:
    """The end of a file's name: the sampler, its steps if they are a setting, and the seed."""
    steps = getattr(settings, "num_steps", None)
    return f"{settings.kind}{'' if steps is None else f'-{steps}steps'}-seed{seed}.json"


def write_samples(
    path: Path,
    config: RunConfig,
    options: SampleOptions,
    checkpoint: Path,
    step: int,
    use_ema: bool,
    records: list[dict[str, Any]],
) -> None:
    """One JSON file: the sampler's settings, seed and checkpoint with the samples and their means."""
    what = {name: x for name, x in dataclasses.asdict(options).items() if name != "trace_frames"}
    names = ("network_calls", "steps", "unigram_entropy", "parallelism", "kendall_tau")
    record = {
        "checkpoint": checkpoint.name,
        "checkpoint_hash": fingerprint(checkpoint),
        "step": step,
        "ema": use_ema,
        "diffusion": to_tree(config.diffusion),
        "sampling": to_tree(config.sampling),
        **what,
        "mean": {name: mean_of(records, name) for name in names},
        "samples": records,
    }
    write_record(path, record)


def write_traces(
    path: Path, tokenizer: Tokenizer, observed_S: Tensor, samples: Samples, title: str, facts: str
) -> None:
    """PNG and HTML of the first sample, beside `path`."""
    snapshots = [ids.cpu().numpy() for _, ids in samples.snapshots]
    times = [t for t, _ in samples.snapshots]
    draw_trace(snapshots, times, tokenizer.mask_id, path.with_suffix(".png"))
    write_trace_page(
        snapshots,
        times,
        tokenizer.token_strings,
        tokenizer.mask_id,
        (observed_S >= 0).cpu().numpy(),
        path.with_suffix(".html"),
        title,
        facts,
    )
