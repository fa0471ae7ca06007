"""A trained model as a backend of lm-eval (extra `eval`), on any layout.

The harness runs on every process alike and believes in one; each method deals its requests to the
data-parallel ranks itself, and all get all results.

Shape suffixes: N requests, R requests of one length, T positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor
from tqdm import tqdm

from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.build import build_noise, build_schedule
from xdlm_megatron.data.tokenizer import load_tokenizer
from xdlm_megatron.diffusion.posterior_draw import REFERENCE_DRAW, Draw
from xdlm_megatron.evaluation.generation import build_denoiser
from xdlm_megatron.evaluation.likelihood import LikelihoodEvaluator, Request, make_request, padded_length
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.samplers import sample

DEFAULT_MAX_TOKENS = 256  # of an answer, where a task does not say


@dataclass(frozen=True)
class _Prompt:
    """A request to generate: ids of the context and how many tokens may follow it, up to one of `until`."""

    ids: tuple[int, ...]
    num_tokens: int
    until: tuple[str, ...]


class DiffusionLM(LM):
    """loglikelihood: a bound, by num_draws draws of noise, the same for all continuations of a context.

    generate_until: by the recipe's `sampling` and run.seed; temperatures that a task asks for are not looked
    at. `counts` tells what was cut: contexts that were too long lose their beginning.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        chunks: list[Any],
        objective: Objective,
        num_draws: int,
        draw: Draw = REFERENCE_DRAW,
    ) -> None:
        super().__init__()
        self._config, self._mesh, self._chunks, self._draw = config, mesh, chunks, draw
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self._likelihood = LikelihoodEvaluator(config, mesh, objective, num_draws, label="likelihood")
        self._seq_length = config.data.seq_length
        self.counts: Counter[str] = Counter()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Minus the bound; whether greedy decoding would give the continuation is not known, hence False."""
        groups: dict[str, int] = {}
        made = []
        for context, continuation in (request.args for request in requests):
            group = groups.setdefault(context, len(groups))
            request, cut = make_request(self._tokenizer, context, continuation, group, self._seq_length)
            self.counts["cut_contexts"] += cut
            made.append(request)
        found = [(-nats, False) for nats in self._nats(made)]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts, in pieces of data.seq_length that do not see each other."""
        T, pieces, owner = self._seq_length, [], []
        for index, (text,) in enumerate(request.args for request in requests):
            ids = tuple(self._tokenizer.encode(text))
            for at in range(0, len(ids), T):
                owner.append(index)
                pieces.append(Request((), ids[at : at + T], len(pieces)))
        found = [0.0] * len(requests)
        for index, nats in zip(owner, self._nats(pieces), strict=True):
            found[index] -= nats
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text between a context and the first of the task's stops."""
        prompts = [self._prompt(*request.args) for request in requests]
        lengths = [padded_length(len(each.ids) + each.num_tokens, self._mesh) for each in prompts]
        texts = [""] * len(prompts)
        for T in sorted(set(lengths)):
            rows = [index for index, length in enumerate(lengths) if length == T]
            for index, ids_T in zip(rows, self._generate(prompts, rows, T).tolist(), strict=True):
                texts[index] = self._cut(prompts[index], ids_T)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _nats(self, requests: Sequence[Request]) -> list[float]:
        return self._likelihood(self._chunks, requests).mean(dim=1).tolist() if requests else []

    def _prompt(self, context: str, settings: dict[str, Any]) -> _Prompt:
        until = settings.get("until") or []
        num_tokens = int(settings.get("max_gen_toks", DEFAULT_MAX_TOKENS))
        num_tokens = max(1, min(num_tokens, self._seq_length - 1))
        ids = self._tokenizer.encode(context)
        room = self._seq_length - num_tokens
        self.counts["cut_contexts"] += len(ids) > room
        return _Prompt(tuple(ids[-room:]), num_tokens, (until,) if isinstance(until, str) else tuple(until))

    def _generate(self, prompts: Sequence[_Prompt], rows: list[int], T: int) -> Tensor:
        """Ids [R, T] of these prompts on every process; each data-parallel rank makes its share."""
        mesh, config = self._mesh, self._config
        ids_RT = torch.full((len(rows), T), -1, dtype=torch.int64, device=mesh.device)
        for place, index in enumerate(rows):
            ids = prompts[index].ids
            ids_RT[place, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mine = torch.arange(mesh.data_parallel_rank, len(rows), mesh.data_parallel_size, device=mesh.device)
        row_R = torch.tensor(rows, device=mesh.device)
        denoise, found_RT = build_denoiser(self._chunks, mesh), torch.zeros_like(ids_RT)
        size = max(1, config.train.micro_batch_size * self._seq_length // T)
        bar = tqdm(mine.split(size), desc=f"answers, {T} tokens", disable=None if mesh.is_main else True)
        for chosen in bar if len(mine) else []:
            made = sample(
                denoise,
                config.sampling,
                build_noise(config),
                build_schedule(config.diffusion),
                config.run.seed,
                ids_RT[chosen],
                row_R[chosen],
                draw=self._draw,
            )
            found_RT[chosen] = made.ids_BS
        # Processes that share a model have the same ids: one of them speaks.
        if any(group.rank() for group in (mesh.groups.tp, mesh.groups.pp, mesh.groups.cp)):
            found_RT.zero_()
        return mesh.reduce_sum(found_RT)

    def _cut(self, prompt: _Prompt, ids_T: list[int]) -> str:
        answer = np.array(ids_T[len(prompt.ids) :][: prompt.num_tokens])
        ends = np.flatnonzero(answer == (-1 if self._tokenizer.eod_id is None else self._tokenizer.eod_id))
        text = self._tokenizer.decode(answer[: ends[0] if len(ends) else None].tolist())
        for stop in prompt.until:
            text = text.partition(stop)[0] if stop else text
        return text
