"""Evaluate a trained run on tasks of lm-eval (extra `eval`): multiple choice, perplexity, generation.

    python tools/run_lm_eval.py RECIPE [section.field=value ...] --tasks arc_easy,lambada_openai
    torchrun --nproc-per-node 2 tools/run_lm_eval.py RECIPE --tasks my_task --include-path my_tasks/

Tasks in --include-path are YAML files, whose data may be local JSON lines (docs/evaluation.md). Likelihoods
are bounds by --draws draws of noise, answers come from the recipe's `sampling`. Writes lm_eval.json to
`evaluations/` of the run folder. Exit status: 0 done, 2 a mistake of the user.
"""

import argparse
import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from xdlm_megatron.command_line import add_checkpoint_options, hush_libraries
from xdlm_megatron.config.derive import run_folder
from xdlm_megatron.config.load import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="YAML file, or the recipe.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument(
        "--include-path", type=Path, help="folder of task files; lm-eval's own are then left out"
    )
    parser.add_argument("--limit", type=int, help="documents a task (default: all)")
    parser.add_argument("--num-fewshot", type=int, help="examples in a context (default: the task's)")
    parser.add_argument("--draws", type=int, default=128, help="of noise, for each likelihood (default 128)")
    add_checkpoint_options(parser)
    options = parser.parse_intermixed_args()
    hush_libraries()
    try:
        evaluate(options)
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"run_lm_eval: error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Runs the tasks; the main process prints and writes."""
    if min(options.draws, options.limit or 1) < 1:
        raise ValueError(f"--draws {options.draws} and --limit {options.limit} must be at least 1")
    config = load_recipe(options.recipe, options.overrides)
    try:
        import lm_eval
    except ImportError:
        raise ValueError("lm-eval is missing; pip install 'xdlm_megatron[eval]'") from None
    import xdlm_megatron.parallel  # noqa: F401
    from xdlm_megatron.data.build import build_noise
    from xdlm_megatron.evaluation.harness import DiffusionLM
    from xdlm_megatron.evaluation.records import write_record
    from xdlm_megatron.evaluation.report import checkpoint_record
    from xdlm_megatron.evaluation.restore import choose_checkpoint, restored
    from xdlm_megatron.model.objective import Objective
    from xdlm_megatron.parallel.kernel_choice import choose_kernels_together

    path, use_ema = choose_checkpoint(config, options.checkpoint), not options.no_ema
    tasks, manager = find_tasks(options)
    with restored(config, path, use_ema) as (mesh, chunks, step):
        kernels = choose_kernels_together(config.train.kernels, mesh)
        objective = Objective(
            build_noise(config), mesh, fuse_head=config.train.fuse_head, ops=kernels.row_ops
        )
        model = DiffusionLM(config, mesh, chunks, objective, options.draws, kernels.draw)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            bootstrap_iters=1000,
            log_samples=False,
        )
        if mesh.is_main:
            record = checkpoint_record(config, path, step, use_ema) | {
                "lm_eval": lm_eval.__version__,
                "draws": options.draws,
                "limit": options.limit,
                **{name: found[name] for name in ("results", "versions", "n-shot", "n-samples")},
                "counts": dict(model.counts),
            }
            file = (
                run_folder(config)
                / "evaluations"
                / f"{path.name}-{'ema' if use_ema else 'plain'}-lm_eval.json"
            )
            write_record(file, record)
            print(as_lines(found["results"]), file, sep="\n", flush=True)


def find_tasks(options: argparse.Namespace) -> tuple[list[str], Any]:
    """Names and lm-eval's manager of them. Raises ValueError on a name that it does not know."""
    from lm_eval.tasks import TaskManager

    if options.include_path is not None and not options.include_path.is_dir():
        raise ValueError(f"--include-path {options.include_path}: no such folder")
    include = None if options.include_path is None else str(options.include_path)
    manager = TaskManager(include_path=include, include_defaults=include is None)
    names = [name for name in options.tasks.split(",") if name]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        near = get_close_matches(unknown[0], manager.all_tasks) if unknown else []
        some = ", ".join(near or sorted(manager.all_tasks)[:8])
        raise ValueError(f"--tasks {options.tasks}: no task {', '.join(unknown)}; there are {some} ...")
    return names, manager


def as_lines(results: dict[str, dict[str, Any]]) -> str:
    """A line for each figure of each task."""
    return "\n".join(
        f"{task}  {name.partition(',')[0]}  {value:.4f}"
        for task, figures in results.items()
        for name, value in figures.items()
        if isinstance(value, float)
    )


if __name__ == "__main__":
    sys.exit(main())
