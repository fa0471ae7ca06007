"""Continuations of prompts, and whether greedy decoding gives a text: rows of their own lengths, in batches.

Each data-parallel rank makes its share; all get all results.

Shape suffixes: R rows of one length, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from xdlm_megatron.config.samplers import AnySampler, ConfidenceSampler, LeftToRightSampler
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.build import build_noise, build_schedule
from xdlm_megatron.data.packing import PADDING
from xdlm_megatron.data.tokenizer import Tokenizer
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, Draw
from xdlm_megatron.evaluation.generation import build_denoiser
from xdlm_megatron.evaluation.likelihood import Request, by_length
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.samplers import sample


@dataclass(frozen=True)
class Prompt:
    """What stands there, and how many tokens may follow it, up to one of `until`."""

    ids: tuple[int, ...]
    num_tokens: int
    until: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids) + self.num_tokens


@dataclass(frozen=True)
class Completion:
    """The text behind a prompt, and the network calls that it took."""

    text: str
    network_calls: int


def make_prompt(
    tokenizer: Tokenizer, context: str, num_tokens: int, until: Sequence[str], seq_length: int
) -> tuple[Prompt, bool]:
    """With room for num_tokens, or what a sequence has; and whether the context lost its beginning."""
    num_tokens = max(1, min(num_tokens, seq_length - 1))
    ids, room = tokenizer.encode(context), seq_length - num_tokens
    return Prompt(tuple(ids[-room:]), num_tokens, tuple(until)), len(ids) > room


@dataclass(frozen=True)
class Completer:
    """A model, asked on all its processes. seed: of all draws; the n-th prompt's have its number."""

    config: RunConfig
    mesh: Mesh
    chunks: list[Any] = field(repr=False)
    tokenizer: Tokenizer
    seed: int
    draw: Draw = REFERENCE_DRAW

    def __call__(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """By the recipe's `sampling`; a text ends at the end of a document or the first of its stops."""
        found = [Completion("", 0)] * len(prompts)
        for T, chosen in by_length(prompts, self.mesh).items():
            observed_RT = torch.full((len(chosen), T), -1, device=self.mesh.device)
            for row_T, index in zip(observed_RT, chosen, strict=True):
                row_T[: len(prompts[index].ids)] = torch.tensor(prompts[index].ids)
            ids_RT, calls_R = self._fill(observed_RT, chosen, self.config.sampling, label="answers")
            for index, ids_T, calls in zip(chosen, ids_RT.tolist(), calls_R.tolist(), strict=True):
                found[index] = Completion(self._cut(prompts[index], ids_T), calls)
        return found

    def reproduces(self, requests: Sequence[Request]) -> list[bool]:
        """Whether greedy decoding of each prompt gives its target: from as many masks, at every step the
        likeliest token at the position where it is surest, or of an autoregressive model at the next one.
        False where the noise makes no masks.
        """
        found = [False] * len(requests)
        if self.config.diffusion.uniform_ratio == 1:
            return found
        for T, chosen in by_length(requests, self.mesh).items():
            observed_RT = torch.zeros(len(chosen), T, dtype=torch.int64, device=self.mesh.device)
            document_RT = torch.full_like(observed_RT, PADDING, dtype=torch.int32)
            for row, request in enumerate(requests[index] for index in chosen):
                ids = [*request.prompt, *[-1] * len(request.target)]
                observed_RT[row, : len(ids)], document_RT[row, : len(ids)] = torch.tensor(ids), 0
            steps = max(len(requests[index].target) for index in chosen)
            greedily: AnySampler = ConfidenceSampler(kind="confidence", num_steps=steps, temperature=0.0)
            if self.config.model.autoregressive:
                greedily = LeftToRightSampler(kind="left_to_right", temperature=0.0)
            ids_RT, _ = self._fill(observed_RT, chosen, greedily, document_RT, label="greedy decoding")
            for index, ids_T in zip(chosen, ids_RT.tolist(), strict=True):
                request = requests[index]
                found[index] = tuple(ids_T[len(request.prompt) : len(request)]) == request.target
        return found

    def _fill(
        self,
        observed_RT: Tensor,
        rows: Sequence[int],
        settings: AnySampler,
        document_RT: Tensor | None = None,
        *,
        label: str,
    ) -> tuple[Tensor, Tensor]:
        """Ids [R, T] and network calls [R], int64, on every process. rows: their names for random numbers."""
        mesh, config = self.mesh, self.config
        R, T = observed_RT.shape
        row_R = torch.tensor(rows, device=mesh.device)
        mine = torch.arange(mesh.data_parallel_rank, R, mesh.data_parallel_size, device=mesh.device)
        found_RT, calls_R = torch.zeros_like(observed_RT), torch.zeros_like(row_R)
        size = max(1, config.train.micro_batch_size * config.data.seq_length // T)
        bar = tqdm(mine.split(size), desc=f"{label}, {T} tokens", disable=None if mesh.is_main else True)
        for chosen in bar if len(mine) else []:
            made = sample(
                build_denoiser(self.chunks, mesh, None if document_RT is None else document_RT[chosen]),
                settings,
                build_noise(config),
                build_schedule(config.diffusion),
                self.seed,
                observed_RT[chosen],
                row_R[chosen],
                draw=self.draw,
            )
            found_RT[chosen], calls_R[chosen] = made.ids_BS, made.evaluations_B
        # Processes that share a model have the same ids: one of them speaks.
        if any(group.rank() for group in (mesh.groups.tp, mesh.groups.pp, mesh.groups.cp)):
            found_RT.zero_(), calls_R.zero_()
        return mesh.reduce_sum(found_RT), mesh.reduce_sum(calls_R)

    def _cut(self, prompt: Prompt, ids_T: list[int]) -> str:
        answer, end = ids_T[len(prompt.ids) :][: prompt.num_tokens], self.tokenizer.eod_id
        text = self.tokenizer.decode(answer[: answer.index(end)] if end in answer else answer)
        for stop in prompt.until:
            text = text.partition(stop)[0] if stop else text
        return text
