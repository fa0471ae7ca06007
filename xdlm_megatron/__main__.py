"""python -m xdlm_megatron VERB RECIPE.yaml [section.field=value ...]"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence

from xdlm_megatron import __version__
from xdlm_megatron.config.derive import derive, model_parallel_size
from xdlm_megatron.config.load import dump_recipe, load_recipe
from xdlm_megatron.config.schema import RunConfig

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0 done, 1 training failed, 2 the user's mistake (no traceback)."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:  # ConfigError, DataError, CheckpointError: each names value, rule and cure
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted before it could save")


def _show_config(options: argparse.Namespace) -> int:
    config = load_recipe(options.recipe, options.overrides)
    world_size = options.world_size or _world_size() or model_parallel_size(config)
    derived = derive(config, world_size)
    print(dump_recipe(config))
    print(f"# derived, on {world_size} processes")
    for name, value in dataclasses.asdict(derived).items():
        print(f"# {name}: {value:,}" if isinstance(value, int) else f"# {name}: {value:.4g}")
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
    config = _load(options)
    # First, so that the patches of Megatron-Core are in place when the rest imports it.
    import xdlm_megatron.parallel  # noqa: F401
    from xdlm_megatron.train.loop import TrainingError
    from xdlm_megatron.train.run import train

    try:
        train(config, resume=options.resume)
    except TrainingError as error:
        _fail(str(error))
        return 1
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    config = _load(options)
    import xdlm_megatron.parallel  # noqa: F401
    from xdlm_megatron.evaluation.run import evaluate

    evaluate(config, checkpoint=options.checkpoint, use_ema=not options.no_ema)
    return 0


def _sample(options: argparse.Namespace) -> int:
    config = _load(options)
    import xdlm_megatron.parallel  # noqa: F401
    from xdlm_megatron.evaluation.generation import SampleOptions
    from xdlm_megatron.evaluation.run import sample

    sampling = SampleOptions(
        num_steps=options.steps,
        num_samples=options.num_samples,
        temperature=options.temperature,
        top_p=options.top_p,
        final=options.final,
        seed=options.seed,
        prompt=options.prompt,
        trace_frames=options.trace,
    )
    sample(config, sampling, checkpoint=options.checkpoint, use_ema=not options.no_ema)
    return 0


def _fail(message: str) -> int:
    """One message, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    return USER_ERROR


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
        "--world-size", type=int, help="processes (default: WORLD_SIZE, or the smallest that fits)"
    )

    train = verb("train", _train, "train; start it with torchrun for several processes")
    train.add_argument("--resume", action="store_true", help="go on from the run folder's latest checkpoint")

    for name, run, summary in (
        ("evaluate", _evaluate, "held-out negative ELBO of a trained run"),
        ("sample", _sample, "text from a trained run"),
    ):
        added = verb(name, run, summary)
        added.add_argument("--checkpoint", help="checkpoint folder (default: the run folder's latest)")
        added.add_argument("--no-ema", action="store_true", help="use the plain weights, not their average")
        if name == "sample":
            _add_sample_options(added)
    return parser


def _add_sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=64, help="reverse steps (default 64)")
    parser.add_argument("--num-samples", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument(
        "--final",
        choices=("ancestral", "greedy", "none"),
        default="ancestral",
        help="removal of the last noise",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompt", help="text that every sample begins with; it never changes")
    parser.add_argument("--trace", type=int, default=0, metavar="N", help="show N frames of the first sample")


if __name__ == "__main__":
    sys.exit(main())
