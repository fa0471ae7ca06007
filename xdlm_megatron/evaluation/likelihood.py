"""Bounds on conditional likelihoods, -log p(target | prompt): the prompt stays clean, the target is noised.

Each request is a sample of its own, under num_draws draws whose times are stratified over (t_min, 1). The
choices of a question share times and noise (common random numbers), so that what they have in common cancels
in the difference.

Shape suffixes: T positions of a sample, R requests, D draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.batch import Clean, DocumentRules, NoisedSamples
from xdlm_megatron.data.build import build_noise, build_schedule
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.packing import PADDING
from xdlm_megatron.data.tokenizer import Tokenizer
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.evaluation.rounds import Rounds
from xdlm_megatron.evaluation.terms import Terms
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh

LENGTH_STEP = 32  # requests are padded to a multiple of it; those of one length go together


@dataclass(frozen=True)
class Request:
    """Ids of the target are scored, those of the prompt are not. Requests of one group share their noise."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    group: int

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def make_request(
    tokenizer: Tokenizer, prompt: str, target: str, group: int, seq_length: int
) -> tuple[Request, bool]:
    """The ids of prompt + target, cut where they leave those of the prompt alone; and whether it was cut.

    Too long a prompt loses its beginning. Raises DataError where the target is empty or does not fit alone.
    """
    whole, alone = tokenizer.encode(prompt + target), tokenizer.encode(prompt)
    agree = np.cumprod([a == b for a, b in zip(whole, alone, strict=False)], dtype=int)
    start = min(int(agree.sum()), len(whole) - 1)
    if start < 0 or not target:
        raise DataError(f"the target {target!r} after {prompt[-40:]!r} has no tokens; give it some text")
    length = len(whole) - start
    if length > seq_length:
        raise DataError(
            f"the target {target[:40]!r} has {length} tokens and data.seq_length is {seq_length}; shorten it"
        )
    first = max(0, len(whole) - seq_length)
    return Request(tuple(whole[first:start]), tuple(whole[start:]), group), first > 0


def padded_length(length: int, mesh: Mesh) -> int:
    """The next length that goes with others, and that the processes which share a sequence can cut."""
    step = math.lcm(LENGTH_STEP, mesh.groups.tp.size() * mesh.groups.cp.size())
    return -(-length // step) * step


def by_length(rows: Sequence[Sized], mesh: Mesh) -> dict[int, list[int]]:
    """{padded length: indices of the rows of that length}, the shortest first."""
    found: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(padded_length(len(row), mesh), []).append(index)
    return dict(sorted(found.items()))


class _RequestRows:
    """Requests as samples (data/packing.py: Packing), padded at their end."""

    def __init__(self, requests: Sequence[Request], seq_length: int) -> None:
        self._requests, self.seq_length = requests, seq_length
        self.summary = f"{len(requests)} requests"

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        ids_T = np.zeros(self.seq_length, dtype=np.int64)
        request = self._requests[index]
        ids_T[: len(request)] = (*request.prompt, *request.target)
        return ids_T

    def documents(self, index: int) -> NDArray[np.int32]:
        beyond_T = np.arange(self.seq_length) >= len(self._requests[index])
        return np.where(beyond_T, PADDING, 0).astype(np.int32)

    def prompts(self, index: int) -> NDArray[np.bool_]:
        return np.arange(self.seq_length) < len(self._requests[index].prompt)


@dataclass(frozen=True)
class _Draws:
    """Sample ids request * num_draws + draw."""

    num_samples: int
    num_draws: int

    def rows(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return sample_ids // self.num_draws


@dataclass(frozen=True)
class _RequestSamples(NoisedSamples):
    """Samples whose noise is that of their group's number, not of their own."""

    groups_R: NDArray[np.int64] = field(kw_only=True)
    num_draws: int = field(kw_only=True)

    def clean(self, sample_ids: NDArray[np.int64]) -> Clean:
        request, draw = np.divmod(sample_ids, self.num_draws)
        shared = torch.from_numpy(self.groups_R[request] * self.num_draws + draw)
        return dataclasses.replace(super().clean(sample_ids), id_B=shared.to(self.device))


@dataclass(frozen=True)
class LikelihoodEvaluator:
    """Scores requests under num_draws draws each; label: of a progress bar, None: none."""

    config: RunConfig
    mesh: Mesh
    objective: Objective
    num_draws: int
    label: str | None = None

    def __call__(self, chunks: list[Any], requests: Sequence[Request]) -> Tensor:
        """Nats of each request's target under each draw, float64 [R, D]; their mean bounds -log p.

        All processes call it; all get the result.
        """
        nats_RD = torch.empty(len(requests), self.num_draws, dtype=torch.float64, device=self.mesh.device)
        for length, indices in by_length(requests, self.mesh).items():
            terms = self._terms(chunks, [requests[i] for i in indices], length)
            parts = terms.strict(terms.density())
            nats_RD[indices] = sum(parts.values(), nats_RD.new_zeros(())).view(len(indices), -1)
        return nats_RD

    def _terms(self, chunks: list[Any], requests: Sequence[Request], length: int) -> Terms:
        config, mesh, num_draws = self.config, self.mesh, self.num_draws
        num_rows = len(requests) * num_draws
        samples = _RequestSamples(
            dataset=_RequestRows(requests, length),
            index=_Draws(len(requests), num_draws),
            noise=build_noise(config),
            schedule=build_schedule(config.diffusion),
            seed=config.run.seed,
            t_min=config.diffusion.t_min,
            streams=(Stream.EVAL_TIME, Stream.EVAL_NOISE),
            device=mesh.device,
            positions=mesh.sequence_slice(length),
            rules=DocumentRules(separate=True, clean_prompts=True),
            groups_R=np.array([request.group for request in requests]),
            num_draws=num_draws,
        )
        # As many tokens at a time as in training, and no more rows than a process gets.
        size = max(1, config.train.micro_batch_size * config.data.seq_length // length)
        size = min(size, math.ceil(num_rows / mesh.data_parallel_size))
        rounds = Rounds(mesh, chunks, size, length, self.label and f"{self.label}, {length} tokens")
        return Terms(rounds, samples, self.objective, num_rows, num_draws)
