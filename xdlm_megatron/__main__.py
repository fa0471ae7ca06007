"""python -m xdlm_megatron VERB RECIPE.yaml [section.field=value ...]"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from enum import IntEnum
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

from xdlm_megatron.command_line import hush_libraries, parse
from xdlm_megatron.config.derive import derive, model_parallel_size
from xdlm_megatron.config.load import dump_recipe, load_recipe
from xdlm_megatron.config.schema import RunConfig

FULL_DISK = (ENOSPC, EDQUOT, EFBIG)


class ExitStatus(IntEnum):
    """What a process of a run tells whoever started it. torchrun makes 1 of all that are not 0."""

    DONE = 0  # finished, or stopped as asked
    FAILED = 1  # training cannot go on, or a crash
    USER_ERROR = 2  # recipe, data, checkpoint or command line, told in one line
    REQUEUE = 75  # saved, or lost a process before anything began: start it again. EX_TEMPFAIL of sysexits.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status."""
    options = parse(arguments)
    hush_libraries()
    try:
        return VERBS[options.verb](options)
    except ValueError as error:  # ConfigError, DataError, CheckpointError: each names value, rule and cure
        if not _is_ours(error):
            raise
        return _fail(str(error))
    except BrokenPipeError:  # show-config | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}; correct the path or its permissions")
        if error.errno not in FULL_DISK:
            raise
        return _fail(f"{error.strerror}: a file could not be written whole; make room, then try again")
    except KeyboardInterrupt:
        return _fail("interrupted before it could save" if options.verb == "train" else "interrupted")


def _show_config(options: argparse.Namespace) -> int:
    config = load_recipe(options.recipe, options.overrides)
    world_size = options.world_size
    if world_size is None:
        world_size = _world_size() or model_parallel_size(config)
    derived = derive(config, world_size)
    print(dump_recipe(config))
    print(f"# derived, on {world_size} processes")
    for name, value in dataclasses.asdict(derived).items():
        print(f"# {name}: {value:,}" if isinstance(value, int) else f"# {name}: {value:.4g}")
    sys.stdout.flush()  # here, where a reader that has left is known of
    return 0


def _load(options: argparse.Namespace) -> RunConfig:
    """The recipe, its layout checked against the processes before torch is imported."""
    config = load_recipe(options.recipe, options.overrides)
    derive(config, _world_size() or 1)
    return config


def _world_size() -> int:
    """Processes as torchrun says; 0 without it."""
    return int(os.environ.get("WORLD_SIZE", "0"))


def _train(options: argparse.Namespace) -> int:
    if options.allow_fallback and not options.resume:
        return _fail("--allow-fallback has no effect without --resume; add it, or leave both out")
    config = _load(options)
    # First, so that the patches of Megatron-Core are in place when the rest imports it.
    import xdlm_megatron.parallel  # noqa: F401
    from xdlm_megatron.train.ending import REQUEUE, LostAtStartError, TrainingError
    from xdlm_megatron.train.run import train

    try:
        outcome = train(config, resume=options.resume, allow_fallback=options.allow_fallback)
    except LostAtStartError:  # told already, as all TrainingErrors
        return ExitStatus.REQUEUE
    except TrainingError:
        return ExitStatus.FAILED
    return ExitStatus.REQUEUE if outcome == REQUEUE else ExitStatus.DONE


def _evaluate(options: argparse.Namespace) -> int:
    if options.draws is not None and not options.choices:
        return _fail(f"--draws {options.draws} has no effect without --choices; add one, or leave it out")
    config = _load(options)
    import xdlm_megatron.parallel  # noqa: F401
    from xdlm_megatron.evaluation.evaluate import EvaluateOptions, evaluate
    from xdlm_megatron.evaluation.texts import TextSet

    given = {} if options.draws is None else {"num_draws": options.draws}
    wanted = EvaluateOptions(
        discrete_steps=options.discrete_steps,
        reconstruction=options.reconstruction,
        texts=tuple(TextSet(path, rules) for rules, path in options.text),
        choices=tuple(options.choices),
        **given,
    )
    evaluate(config, wanted, checkpoint=options.checkpoint, use_ema=not options.no_ema)
    return 0


def _sample(options: argparse.Namespace) -> int:
    flags = {
        "num_steps": options.steps,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "final": options.final,
    }
    settings = [f"sampling.{name}={value}" for name, value in flags.items() if value is not None]
    kind = [f"sampling={{kind: {options.sampler}}}"] if options.sampler else []
    options.overrides = [*kind, *settings, *options.overrides]
    config = _load(options)
    import xdlm_megatron.parallel  # noqa: F401
    from xdlm_megatron.evaluation.generation import SampleOptions
    from xdlm_megatron.evaluation.run import sample

    what = SampleOptions(
        num_samples=options.num_samples,
        seed=options.seed,
        prompt=options.prompt,
        suffix=options.suffix,
        trace_frames=options.trace,
    )
    sample(config, what, checkpoint=options.checkpoint, use_ema=not options.no_ema)
    return 0


def _convert(options: argparse.Namespace) -> int:
    idle = ("checkpoint", "names", "no_ema") if options.to_hf is None else ("write_recipe",)
    for name in idle:
        if getattr(options, name):
            way = "--from-hf" if options.to_hf is None else "--to-hf"
            return _fail(f"--{name.replace('_', '-')} has no effect with {way}; leave it out")
    config = load_recipe(options.recipe, options.overrides)
    import xdlm_megatron.parallel  # noqa: F401
    from xdlm_megatron.convert.from_hf import convert_from_hf, print_sections
    from xdlm_megatron.convert.to_hf import convert_to_hf

    if options.to_hf is not None:
        names = options.names or "llada"
        convert_to_hf(config, Path(options.to_hf), names, options.checkpoint, use_ema=not options.no_ema)
    elif options.write_recipe:
        print_sections(Path(options.from_hf))
    else:
        convert_from_hf(config, Path(options.from_hf))
    return 0


def _fit(options: argparse.Namespace) -> int:
    from xdlm_megatron.scaling.fit import Options
    from xdlm_megatron.scaling.run import Sources, run

    sources = Sources(
        runs=options.runs,
        table=options.points,
        mlflow=options.mlflow,
        experiment=options.experiment,
        count=options.count,
        metric=options.metric,
    )
    fitting = Options(options.draws, options.level, options.seed, tuple(options.flops))
    run(sources, fitting, Path(options.output))
    return 0


def _plan(options: argparse.Namespace) -> int:
    config = load_recipe(options.recipe, options.overrides)
    from xdlm_megatron.launch.plan import choose_gpu, make_plan, to_json
    from xdlm_megatron.launch.table import as_text

    gpu = choose_gpu(options.gpu, options.gpu_memory)
    plan = make_plan(config, gpu, options.gpus, options.top)
    print(to_json(plan) if options.json else as_text(plan, config.run.name), flush=True)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from xdlm_megatron.scaling import sweep_run
    from xdlm_megatron.scaling.sweep import load_sweep

    plan = load_sweep(options.recipe, options.overrides)
    if options.dry_run:
        return sweep_run.dry_run(plan)
    if options.status:
        return sweep_run.status(plan)
    if options.table is not None:
        return sweep_run.write_table(plan, Path(options.table))
    if options.local is not None:
        return sweep_run.run_here(plan, options.local)
    return sweep_run.submit_missing(plan)


def _study(options: argparse.Namespace) -> int:
    from xdlm_megatron.scaling.sweep import load_sweep
    from xdlm_megatron.study.protocol import Protocol
    from xdlm_megatron.study.run import study

    protocol = Protocol(
        num_steps=tuple(options.steps),
        dynamics_steps=options.dynamics_steps,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        scorer=options.scorer,
        scorer_dtype=options.scorer_dtype,
    )
    plan = load_sweep(options.recipe, options.overrides)
    return study(plan, protocol, options.local, Path(options.output))


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it: what others raise is a bug, and needs its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _fail(message: str) -> int:
    """One message a machine: its processes see the same recipe and the same disk."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    return ExitStatus.USER_ERROR


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "show-config": _show_config,
    "train": _train,
    "evaluate": _evaluate,
    "sample": _sample,
    "convert": _convert,
    "plan": _plan,
    "sweep": _sweep,
    "study": _study,
    "fit": _fit,
}


if __name__ == "__main__":
    sys.exit(main())
