"""What a study measures of each checkpoint of each model, as jobs that know whether they are done.

Its results go into the run folder, where `evaluate`, `sample` and tools/score_samples.py leave theirs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdlm_megatron.checkpoint.integrity import fingerprint
from xdlm_megatron.checkpoint.reader import list_checkpoints
from xdlm_megatron.config.load import load_recipe, to_tree, with_overrides
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.evaluation.evaluate import evaluation_settings
from xdlm_megatron.evaluation.samples_on_disk import samples_name
from xdlm_megatron.evaluation.scorer import scorer_fingerprint

SCORES = ".scores.json"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """num_steps: of ancestral sampling at the end of training; dynamics_steps: on the way there too, and of
    sampling by confidence. num_samples: of each model and setting. batch_size: sequences at a time; results
    do not depend on it. scorer: a causal language model of Hugging Face, its dtype; None: no perplexities.
    """

    num_steps: tuple[int, ...] = (4, 8, 16, 32, 64)
    dynamics_steps: int = 16
    num_samples: int = 128
    batch_size: int = 64
    scorer: Path | None = None
    scorer_dtype: str = "float32"

    @functools.cached_property
    def judge(self) -> tuple[str, str] | None:
        """Name and fingerprint of the scorer, as a file of scores has them."""
        if self.scorer is None:
            return None
        return f"{self.scorer.name} in {self.scorer_dtype}", scorer_fingerprint(self.scorer)


@dataclass(frozen=True)
class Job:
    """One evaluation, or one file of samples with its scores. sampling: overrides; None: an evaluation.

    reconstruction: the evaluation asks for it.
    """

    run: Path
    checkpoint: Path
    sampling: tuple[str, ...] | None
    reconstruction: bool
    protocol: Protocol

    @property
    def config(self) -> RunConfig:
        size = self.protocol.batch_size
        batch = (f"train.micro_batch_size={size}", f"train.global_batch_size={size}")
        config = load_recipe(self.run / "recipe.yaml")
        rampless = () if config.train.rampup_batch_size is None else ("train.rampup_batch_size=null",)
        return with_overrides(config, [*batch, *rampless, *(self.sampling or ())])

    @property
    def samples(self) -> Path:
        """Where `sample` writes; the seed is the run's, so that models of one seed share random numbers."""
        config = self.config
        name = samples_name(config.sampling, config.run.seed)
        return self.run / "samples" / f"{self.checkpoint.name}-ema-{name}"

    @property
    def result(self) -> Path:
        if self.sampling is None:
            return self.run / "evaluations" / f"{self.checkpoint.name}-ema.json"
        return self.samples.with_suffix(SCORES)

    def read(self) -> dict[str, Any] | None:
        """The result, if it is of this checkpoint and this protocol; else None."""
        try:
            record: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return record if self._is_ours(record) else None

    def _is_ours(self, record: dict[str, Any]) -> bool:
        made_by = record if self.sampling is None else record.get("made_by") or {}
        if made_by.get("checkpoint_hash") != fingerprint(self.checkpoint):
            return False
        if self.sampling is None:
            wanted = evaluation_settings(self.config)
            same = {name: record.get(name) for name in wanted} == wanted
            return same and (bool(record.get("reconstruction")) or not self.reconstruction)
        judge = record.get("scorer")
        return (
            made_by.get("sampling") == to_tree(self.config.sampling)
            and made_by.get("num_samples") == self.protocol.num_samples
            and (None if judge is None else (judge.get("name"), judge.get("fingerprint")))
            == self.protocol.judge
        )


def plan_jobs(run: Path, protocol: Protocol) -> list[Job]:
    """All of a finished run; the last checkpoint is measured in full, those before it for the dynamics."""
    config = load_recipe(run / "recipe.yaml")
    checkpoints = sorted(list_checkpoints(run / "checkpoints"))
    jobs = []
    for checkpoint in checkpoints:
        last = checkpoint == checkpoints[-1]
        jobs.append(Job(run, checkpoint, None, last, protocol))
        jobs += [
            Job(run, checkpoint, sampling, False, protocol) for sampling in _samplers(config, protocol, last)
        ]
    return jobs


def _samplers(config: RunConfig, protocol: Protocol, last: bool) -> Sequence[tuple[str, ...]]:
    if config.model.autoregressive:
        return [("sampling={kind: left_to_right}",)]
    steps = {*(protocol.num_steps if last else ()), protocol.dynamics_steps}
    found = [("sampling={kind: ancestral}", f"sampling.num_steps={number}") for number in sorted(steps)]
    if config.diffusion.uniform_ratio < 1:  # there are masks to fill
        found.append(("sampling={kind: confidence}", f"sampling.num_steps={protocol.dynamics_steps}"))
    return found
