"""The command line: verbs, their options, and what a value may be. What a verb does is in __main__.py."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from xdlm_megatron import __version__


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides (of `fit`: run folders) may stand before and behind options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    (options.runs if options.verb == "fit" else options.overrides).extend(rest)
    return options


def hush_libraries() -> None:
    """Warnings that speak to developers of Megatron-Core and torch are not shown; -W default shows them."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)\.")


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

    def verb(name: str, summary: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=summary, description=summary)
        added.add_argument("recipe", help="YAML file, or the recipe.yaml of a run folder")
        added.add_argument(
            "overrides",
            nargs="*",
            default=[],  # else argparse calls them required
            metavar="section.field=value",
            help="overrides of the recipe",
        )
        return added

    show = verb("show-config", "print the resolved recipe and what follows from it")
    show.add_argument(
        "--world-size", type=_COUNT, help="processes (default: WORLD_SIZE, or the smallest that fits)"
    )

    train = verb("train", "train; start it with torchrun for several processes")
    train.add_argument("--resume", action="store_true", help="go on from the run folder's latest checkpoint")
    train.add_argument(
        "--allow-fallback",
        action="store_true",
        help="with --resume: where that one is damaged, go on from the newest whole one before it",
    )

    evaluate = verb("evaluate", "bounds on the held-out likelihood of a trained run")
    sample = verb("sample", "text from a trained run")
    for trained in (evaluate, sample):
        add_checkpoint_options(trained)
    _add_evaluate_options(evaluate)
    _add_sample_options(sample)
    _add_convert_options(verb("convert", "weights from or to a Hugging Face folder"))
    _add_plan_options(verb("plan", "memory, time and the best layout of a recipe on a cluster"))
    _add_sweep_options(verb("sweep", "many runs from one file, by Slurm or here: starts what is missing"))
    _add_study_options(verb("study", "the models of a sweep trained here, measured and compared"))
    _add_fit(verbs.add_parser("fit", help="scaling laws of finished runs", description=_FIT))
    return parser


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which weights of a run; tools/ have them too."""
    parser.add_argument("--checkpoint", help="checkpoint folder (default: the run folder's latest)")
    parser.add_argument("--no-ema", action="store_true", help="use the plain weights, not their average")


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


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="h100", help="GPU type (default h100); an unknown one lists them")
    parser.add_argument("--gpus", type=_COUNT, default=8, help="GPUs in all (default 8)")
    parser.add_argument(
        "--gpu-memory", type=_GIB, help="GiB of a GPU that a process finds (default: its type's)"
    )
    parser.add_argument("--top", type=_COUNT, default=8, help="layouts to show (default 8)")
    parser.add_argument("--json", action="store_true", help="everything as JSON, bytes and seconds")


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the runs: tokens, FLOPs, hours, cost")
    what.add_argument("--status", action="store_true", help="print how far each run is")
    what.add_argument(
        "--table", metavar="FILE.csv", help="write the finished runs as `fit --points` reads them"
    )
    what.add_argument("--local", type=_COUNT, metavar="N", help="without Slurm: on this machine, N at a time")


def _add_study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--local", type=_COUNT, default=2, metavar="N", help="runs at a time (default 2)")
    parser.add_argument("--output", default="study", help="folder of tables and pictures (default study)")
    parser.add_argument(
        "--steps",
        type=_COUNT,
        nargs="+",
        default=[4, 8, 16, 32, 64],
        help="of sampling (default 4 8 16 32 64)",
    )
    parser.add_argument(
        "--dynamics-steps", type=_COUNT, default=16, metavar="T", help="of sampling on the way (default 16)"
    )
    parser.add_argument(
        "--num-samples", type=_COUNT, default=128, help="of each model and setting (default 128)"
    )
    parser.add_argument("--batch-size", type=_COUNT, default=64, help="sequences at a time (default 64)")
    parser.add_argument(
        "--scorer", type=Path, metavar="FOLDER", help="a causal language model, as tools/score_samples.py's"
    )
    parser.add_argument(
        "--scorer-dtype", choices=("float32", "bfloat16"), default="float32", help="default float32"
    )


_FIT = "Fit L(N, D), iso-FLOP valleys and the frontier to finished runs; each uniform_ratio on its own."


def _add_fit(parser: argparse.ArgumentParser) -> None:
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
        "--reconstruction",
        action="store_true",
        help="also how often the likeliest token is right, by noise level and by what is seen in its place",
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
