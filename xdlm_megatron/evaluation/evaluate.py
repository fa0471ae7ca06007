"""The verb `evaluate`: a recipe and a checkpoint in, figures with their errors out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from xdlm_megatron.config.derive import run_folder
from xdlm_megatron.config.load import to_tree
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.build import build_noise
from xdlm_megatron.data.documents import find_inputs
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.tokenizer import load_tokenizer
from xdlm_megatron.evaluation.bound import BoundEvaluator, TimedObjective
from xdlm_megatron.evaluation.choices import judge, make_requests, read_questions
from xdlm_megatron.evaluation.likelihood import LikelihoodEvaluator
from xdlm_megatron.evaluation.nelbo import NelboEvaluator, build_evaluator
from xdlm_megatron.evaluation.reconstruction import reconstruction
from xdlm_megatron.evaluation.report import Report, checkpoint_record
from xdlm_megatron.evaluation.restore import choose_checkpoint, restored, which_weights
from xdlm_megatron.evaluation.text_stats import unigram_entropy
from xdlm_megatron.evaluation.texts import TextSet, build_text_samples
from xdlm_megatron.parallel.kernel_choice import choose_kernels_together
from xdlm_megatron.parallel.mesh import Mesh

Ask = Callable[[list[Any]], Any]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate; the fields are the command line's. Without texts and choices: data.valid_prefix.

    discrete_steps: of a chain's bound; None: none. reconstruction: also how often the likeliest token is
    right. choices: files of questions. num_draws: for each choice.
    """

    discrete_steps: int | None = None
    reconstruction: bool = False
    texts: tuple[TextSet, ...] = ()
    choices: tuple[Path, ...] = ()
    num_draws: int = 128


@dataclass(frozen=True)
class _Evaluation:
    """A model ready to be asked; what it answers goes to `report`, on the main process."""

    config: RunConfig
    options: EvaluateOptions
    mesh: Mesh
    chunks: list[Any] = field(repr=False)
    objective: TimedObjective
    report: Report

    def held_out(self) -> None:
        self._bound("", build_evaluator(self.config, self.mesh, self.objective, label="held-out text"), {})

    def text(self, text: TextSet) -> None:
        texts, positions = text.read(), self.mesh.sequence_slice(self.config.data.seq_length)
        tokenizer = load_tokenizer(self.config.data.tokenizer)
        samples, bytes_per_token = build_text_samples(
            self.config, tokenizer, texts, self.mesh.device, positions
        )
        label = text.path.name
        evaluator = NelboEvaluator(self.config, self.mesh, samples, self.objective, bytes_per_token, label)
        self._bound(f"-{_stem(text.path)}", evaluator, {"text": str(text.path), "rules": text.rules})

    def _bound(self, name: str, evaluator: NelboEvaluator, settings: dict[str, Any]) -> None:
        found = BoundEvaluator(evaluator, self.options.discrete_steps)(self.chunks)
        accuracy = reconstruction(evaluator, self.chunks) if self.options.reconstruction else []
        if self.mesh.is_main:
            settings |= {"num_noise_draws": self.config.evaluation.num_noise_draws}
            settings |= evaluation_settings(self.config)
            entropy = unigram_entropy(_scored_ids(evaluator))
            self.report.bounds(name, settings, found, accuracy, entropy)

    def choices(self, path: Path) -> None:
        questions, tokenizer = read_questions(path), load_tokenizer(self.config.data.tokenizer)
        requests, num_cut = make_requests(tokenizer, questions, self.config.data.seq_length)
        evaluator = LikelihoodEvaluator(
            self.config, self.mesh, self.objective, self.options.num_draws, label=path.name
        )
        nats_RD = evaluator(self.chunks, requests)
        if self.mesh.is_main:
            settings = {"choices": str(path), "num_draws": self.options.num_draws, "num_cut_prompts": num_cut}
            self.report.choices(f"-{_stem(path)}", settings, judge(questions, nats_RD))


def evaluate(
    config: RunConfig,
    options: EvaluateOptions | None = None,
    checkpoint: str | None = None,
    use_ema: bool = True,
) -> None:
    """Prints bounds on text, and answers to questions; writes them to `evaluations/` of the run folder.

    Raises:
        DataError, CheckpointError: a text or the checkpoint is missing or does not fit the recipe.
    """
    options = options or EvaluateOptions()
    if config.model.autoregressive and options.discrete_steps is not None:
        raise DataError(
            "--discrete-steps bounds a chain, and model.autoregressive=true runs none; leave it out"
        )
    _check_files(options)
    path = choose_checkpoint(config, checkpoint)
    with restored(config, path, use_ema) as (mesh, chunks, step):
        kernels = choose_kernels_together(config.train.kernels, mesh)
        objective = TimedObjective(
            build_noise(config),
            mesh,
            fuse_head=config.train.fuse_head,
            ops=kernels.row_ops,
            t_min=config.diffusion.t_min,
        )
        if mesh.is_main:
            print(f"loss by {kernels.reason}\n{path} (step {step}, {which_weights(use_ema)})", flush=True)
        stem = run_folder(config) / "evaluations" / f"{path.name}-{'ema' if use_ema else 'plain'}"
        report = Report(config, stem, checkpoint_record(config, path, step, use_ema))
        evaluation = _Evaluation(config, options, mesh, chunks, objective, report)
        if not options.texts and not options.choices:
            evaluation.held_out()
        for text in options.texts:
            evaluation.text(text)
        for questions in options.choices:
            evaluation.choices(questions)


def evaluation_settings(config: RunConfig) -> dict[str, Any]:
    """What of a recipe decides the figures of its held-out text, beside the model; part of every record."""
    section = to_tree(config.evaluation)
    del section["bound"]  # `evaluate` always gives it
    return {"valid_prefix": config.data.valid_prefix, "evaluation": section}


def _scored_ids(evaluator: NelboEvaluator) -> np.ndarray:
    """The ids that the evaluation scores, whichever of their positions this process holds."""
    whole = replace(evaluator.samples, positions=slice(None))
    clean = whole.clean(np.arange(evaluator.num_sequences))
    return clean.x0_BS[clean.scored_BS].cpu().numpy()


def _check_files(options: EvaluateOptions) -> None:
    """Raises DataError and OSError for what else shows once a model is loaded or a text evaluated."""
    stems: dict[str, Path] = {}
    for path in (*(text.path for text in options.texts), *options.choices):
        other = stems.setdefault(_stem(path), path)
        if other is not path:
            raise DataError(
                f"{other} and {path} would both be the record '{_stem(path)}'; rename one of them"
            )
    for text in options.texts:
        find_inputs((str(text.path),))
    for questions in options.choices:
        read_questions(questions)


def _stem(path: Path) -> str:
    return path.name.split(".")[0]
