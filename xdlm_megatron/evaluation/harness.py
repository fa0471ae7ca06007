"""A trained model as a backend of lm-eval (extra `eval`), on any layout.

The harness runs on every process alike and believes in one; each method deals its requests to the
data-parallel ranks itself, and all get all results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.tokenizer import load_tokenizer
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, Draw
from xdlm_megatron.evaluation.completions import Completer, Prompt, make_prompt
from xdlm_megatron.evaluation.likelihood import LikelihoodEvaluator, Request, make_request
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh

DEFAULT_MAX_TOKENS = 256  # of an answer, where a task does not say


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
        self._chunks, self._tokenizer = chunks, load_tokenizer(config.data.tokenizer)
        self._completer = Completer(config, mesh, chunks, self._tokenizer, config.run.seed, draw)
        self._likelihood = LikelihoodEvaluator(config, mesh, objective, num_draws, label="likelihood")
        self._seq_length = config.data.seq_length
        self.counts: Counter[str] = Counter()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Minus the bound, and whether greedy decoding of the context gives the continuation: a network call
        for each token of the longest.
        """
        groups: dict[str, int] = {}
        made = []
        for context, continuation in (request.args for request in requests):
            group = groups.setdefault(context, len(groups))
            request, cut = make_request(self._tokenizer, context, continuation, group, self._seq_length)
            self.counts["cut_contexts"] += cut
            made.append(request)
        greedy = self._completer.reproduces(made)
        found = [(-nats, same) for nats, same in zip(self._nats(made), greedy, strict=True)]
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
        texts = [completion.text for completion in self._completer(prompts)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _nats(self, requests: Sequence[Request]) -> list[float]:
        return self._likelihood(self._chunks, requests).mean(dim=1).tolist() if requests else []

    def _prompt(self, context: str, settings: dict[str, Any]) -> Prompt:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        num_tokens = int(settings.get("max_gen_toks", DEFAULT_MAX_TOKENS))
        prompt, cut = make_prompt(self._tokenizer, context, num_tokens, until, self._seq_length)
        self.counts["cut_contexts"] += cut
        return prompt
