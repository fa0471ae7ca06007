"""python -m xdlm_megatron VERB RECIPE.yaml [section.field=value ...]"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

from xdlm_megatron import __version__
from xdlm_megatron.config.derive import derive, model_parallel_size
from xdlm_megatron.config.load import dump_recipe, load_recipe
from xdlm_megatron.config.schema import RunConfig


class ExitStatus(IntEnum):
    """What a process of a run tells whoever started it. torchrun makes 1 of all that are not 0."""

    DONE = 0  # finished, or stopped as asked
    FAILED = 1  # training cannot go on, or a crash
    USER_ERROR = 2  # recipe, data, checkpoint or command line, told in one line
    REQUEUE = 75  # saved, and wants to be started again with --resume: EX_TEMPFAIL of sysexits.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status."""
    options = _parse(arguments)
    if not sys.warnoptions:  # these speak to developers of Megatron-Core and torch; -W default shows them
        warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)\.")
    try:
        return options.run(options)
    except ValueError as error:  # ConfigError, DataError, CheckpointError: each names value, rule and cure
        if not _is_ours(error):
            raise
        return _fail(str(error))
    except BrokenPipeError:  # show-config | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}; correct the path or its permissions")
    except KeyboardInterrupt:
        return _fail("interrupted before it could save")


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
    from xdlm_megatron.train.ending import REQUEUE, TrainingError
    from xdlm_megatron.train.run import train

    try:
        outcome = train(config, resume=options.resume, allow_fallback=options.allow_fallback)
    except TrainingError:  # told already
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


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it: what others raise is a bug, and needs its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _fail(message: str) -> int:
    """One message a machine: its processes see the same recipe and the same disk."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    return ExitStatus.USER_ERROR


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides (of `fit`: run folders) may stand before and behind options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    (options.runs if options.verb == "fit" else options.overrides).extend(rest)
    return options


def _number(kind: type, rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: a number for which the rule holds."""

    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = float("nan")
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule} (got '{text}')")
        return value

    return parse


_COUNT = _number(int, "a whole number of at least 1", lambda n: n >= 1)
_SEED = _number(int, "a whole number in [0, 2^32)", lambda n: 0 <= n < 2**32)
_TEMPERATURE = _number(float, "at least 0; 0 takes the likeliest token", lambda x: 0 <= x < float("inf"))
_TOP_P = _number(float, "in (0, 1]; 1 keeps every token", lambda x: 0 < x <= 1)
_DRAWS = _number(int, "a whole number of at least 20", lambda n: n >= 20)
_LEVEL = _number(float, "in (0, 1)", lambda x: 0 < x < 1)
_FLOPS = _number(float, "a positive number of FLOPs, such as 1e21", lambda x: 0 < x < float("inf"))
_GIB = _number(float, "a positive number of GiB", lambda x: 0 < x < float("inf"))
_FRAMES = _number(int, "0, or at least 2: the start and the end", lambda n: n == 0 or n >= 2)


def _text_set(text: str) -> tuple[str, Path]:
    from xdlm_megatron.data.detokenize import RULES

    rules, equals, path = text.partition("=")
    if not equals or rules not in RULES:
        known = ", ".join(RULES)
        raise argparse.ArgumentTypeError(f"must be RULES=FILE with RULES one of {known} (got '{text}')")
    return rules, Path(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xdlm_megatron", description="Mixed diffusion language models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=summary, description=summary)
        added.add_argument("recipe", help="YAML file, or the recipe.yaml of a run folder")
        added.add_argument(
            "overrides", nargs="*", metavar="section.field=value", help="overrides of the recipe"
        )
        added.set_defaults(run=run)
        return added

    show = verb("show-config", _show_config, "print the resolved recipe and what follows from it")
    show.add_argument(
        "--world-size", type=_COUNT, help="processes (default: WORLD_SIZE, or the smallest that fits)"
    )

    train = verb("train", _train, "train; start it with torchrun for several processes")
    train.add_argument("--resume", action="store_true", help="go on from the run folder's latest checkpoint")
    train.add_argument(
        "--allow-fallback",
        action="store_true",
        help="with --resume: where that one is damaged, go on from the newest whole one before it",
    )

    for name, run, summary in (
        ("evaluate", _evaluate, "bounds on the held-out likelihood of a trained run"),
        ("sample", _sample, "text from a trained run"),
    ):
        added = verb(name, run, summary)
        added.add_argument("--checkpoint", help="checkpoint folder (default: the run folder's latest)")
        added.add_argument("--no-ema", action="store_true", help="use the plain weights, not their average")
        (_add_evaluate_options if name == "evaluate" else _add_sample_options)(added)
    _add_convert_options(verb("convert", _convert, "weights from or to a Hugging Face folder"))
    plan = verb("plan", _plan, "memory, time and the best layout of a recipe on a cluster")
    plan.add_argument("--gpu", default="h100", help="GPU type (default h100); an unknown one lists them")
    plan.add_argument("--gpus", type=_COUNT, default=8, help="GPUs in all (default 8)")
    plan.add_argument(
        "--gpu-memory", type=_GIB, help="GiB of a GPU that a process finds (default: its type's)"
    )
    plan.add_argument("--top", type=_COUNT, default=8, help="layouts to show (default 8)")
    plan.add_argument("--json", action="store_true", help="everything as JSON, bytes and seconds")
    sweep = verb("sweep", _sweep, "many runs from one file, by Slurm or here: starts what is missing")
    what = sweep.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the runs: tokens, FLOPs, hours, cost")
    what.add_argument("--status", action="store_true", help="print how far each run is")
    what.add_argument(
        "--table", metavar="FILE.csv", help="write the finished runs as `fit --points` reads them"
    )
    what.add_argument("--local", type=_COUNT, metavar="N", help="without Slurm: on this machine, N at a time")
    _add_fit(verbs.add_parser("fit", help="scaling laws of finished runs", description=_FIT))
    return parser


def _add_convert_options(parser: argparse.ArgumentParser) -> None:
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from-hf", metavar="FOLDER", help="its weights become the checkpoint train.init_from")
    way.add_argument("--to-hf", metavar="FOLDER", help="to be made from a checkpoint")
    parser.add_argument(
        "--write-recipe", action="store_true", help="with --from-hf: print the sections that fit, no more"
    )
    parser.add_argument(
        "--names", choices=("llada", "llama"), help="with --to-hf: of the tensors (default llada)"
    )
    parser.add_argument("--checkpoint", help="with --to-hf: checkpoint folder (default: the run's latest)")
    parser.add_argument("--no-ema", action="store_true", help="with --to-hf: the plain weights")


_FIT = "Fit L(N, D), iso-FLOP valleys and the frontier to finished runs; each uniform_ratio on its own."


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_fit)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, or folders of them")
    parser.add_argument("--points", metavar="FILE.csv", help="columns params, tokens, loss [flops, run, ...]")
    parser.add_argument(
        "--mlflow", metavar="URI", help="an MLflow store: sqlite:///runs/mlflow.db, https://..."
    )
    parser.add_argument("--experiment", default="xdlm", help="of the MLflow store (default xdlm)")
    parser.add_argument("--output", default="scaling_fit", help="folder of the report (default scaling_fit)")
    parser.add_argument(
        "--count",
        choices=("total", "non-embedding"),
        default="total",
        help="what N counts (default total); a table's params are taken as they are",
    )
    parser.add_argument(
        "--metric", default="eval/valid/nelbo_per_token", help="held-out loss of a run (default %(default)s)"
    )
    parser.add_argument("--draws", type=_DRAWS, default=500, help="bootstrap draws (default 500)")
    parser.add_argument("--level", type=_LEVEL, default=0.9, help="of the intervals (default 0.9)")
    parser.add_argument("--seed", type=_SEED, default=0, help="of the bootstrap (default 0)")
    parser.add_argument(
        "--flops", type=_FLOPS, nargs="+", default=[], help="further budgets to predict N, D and loss at"
    )


def _add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--discrete-steps",
        type=_COUNT,
        metavar="T",
        help="also the exact bound of the chain that T sampling steps and the noise removal make",
    )
    parser.add_argument(
        "--text",
        type=_text_set,
        action="append",
        default=[],
        metavar="RULES=FILE.jsonl",
        help="this text in place of data.valid_prefix; RULES undo the benchmark's tokens, plain: none",
    )
    parser.add_argument(
        "--choices",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.jsonl",
        help="questions to answer by likelihood: {prompt, choices, answer} a line",
    )
    parser.add_argument("--draws", type=_COUNT, metavar="N", help="of noise, for each choice (default 128)")


def _add_sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        help="another sampler than the recipe's, with its defaults (sampling.kind)",
    )
    parser.add_argument("--steps", type=_COUNT, metavar="N", help="sampling.num_steps")
    parser.add_argument("--temperature", type=_TEMPERATURE, metavar="T", help="sampling.temperature")
    parser.add_argument("--top-p", type=_TOP_P, metavar="P", help="sampling.top_p")
    parser.add_argument(
        "--final", choices=("ancestral", "greedy", "none"), help="sampling.final: removal of the last noise"
    )
    parser.add_argument("--num-samples", type=_COUNT, default=1, help="sequences (default 1)")
    parser.add_argument("--seed", type=_SEED, default=1, help="of all draws (default 1)")
    parser.add_argument("--prompt", help="text that every sample begins with; it never changes")
    parser.add_argument("--suffix", help="text that every sample ends with; it never changes")
    parser.add_argument(
        "--trace", type=_FRAMES, default=0, metavar="N", help="show N frames of the first sample"
    )


if __name__ == "__main__":
    sys.exit(main())
