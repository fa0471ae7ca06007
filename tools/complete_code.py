"""Let a trained run write programs for problems: what tools/run_code.py runs against their tests.

    python tools/complete_code.py RECIPE PROBLEMS.jsonl[.gz] [section.field=value ...] --num-samples 10
    torchrun --nproc-per-node 2 tools/complete_code.py RECIPE PROBLEMS.jsonl ...

PROBLEMS: in HumanEval's form or MBPP's (docs/evaluation.md). Sampling is the recipe's `sampling`. Writes a
file to `completions/` of the run folder, {task_id, completion, network_calls, made_by} a line, made_by with
the sampler's settings, the seed and the checkpoint's hash. Nothing is run here. Exit status: 0 done, 2 a
mistake of the user.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from xdlm_megatron.command_line import add_checkpoint_options, hush_libraries
from xdlm_megatron.config.derive import run_folder
from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.evaluation.problems import question, read_lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="YAML file, or the recipe.yaml of a run folder")
    parser.add_argument("problems", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--num-samples", type=int, default=1, help="programs for each problem (default 1)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a program (default 256)")
    parser.add_argument("--seed", type=int, default=1, help="of all draws (default 1)")
    add_checkpoint_options(parser)
    options = parser.parse_intermixed_args()
    hush_libraries()
    try:
        complete(options)
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"complete_code: error: {error}", file=sys.stderr)
        return 2
    return 0


def complete(options: argparse.Namespace) -> None:
    """Samples and writes; the main process prints where."""
    if min(options.num_samples, options.max_tokens) < 1:
        raise ValueError(
            f"--num-samples {options.num_samples} and --max-tokens {options.max_tokens} must be at least 1"
        )
    config = load_recipe(options.recipe, options.overrides)
    problems = read_lines(options.problems, ("task_id",)) * options.num_samples
    questions = [question(problem) for problem in problems]
    import xdlm_megatron.parallel  # noqa: F401
    from xdlm_megatron.data.tokenizer import load_tokenizer
    from xdlm_megatron.evaluation.completions import Completer, make_prompt
    from xdlm_megatron.evaluation.report import checkpoint_record
    from xdlm_megatron.evaluation.restore import choose_checkpoint, restored
    from xdlm_megatron.parallel.kernel_choice import choose_kernels_together

    path, use_ema = choose_checkpoint(config, options.checkpoint), not options.no_ema
    tokenizer = load_tokenizer(config.data.tokenizer)
    made = [
        make_prompt(tokenizer, text, options.max_tokens, stops, config.data.seq_length)
        for text, stops in questions
    ]
    with restored(config, path, use_ema) as (mesh, chunks, step):
        draw = choose_kernels_together(config.train.kernels, mesh).draw
        completer = Completer(config, mesh, chunks, tokenizer, options.seed, draw)
        found = completer([prompt for prompt, _ in made])
        if not mesh.is_main:
            return
        made_by = checkpoint_record(config, path, step, use_ema) | {
            "seed": options.seed,
            "problems": str(options.problems),
            "max_tokens": options.max_tokens,
            "cut_prompts": sum(cut for _, cut in made),
        }
        lines = [
            {"task_id": problem["task_id"], "completion": each.text, "network_calls": each.network_calls}
            for problem, each in zip(problems, found, strict=True)
        ]
        weights = "ema" if use_ema else "plain"
        stem = options.problems.name.split(".")[0]
        name = f"{path.name}-{weights}-{config.sampling.kind}-seed{options.seed}-{stem}.jsonl"
        file = run_folder(config) / "completions" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(line | {"made_by": made_by}) + "\n" for line in lines))
        print(f"{len(lines)} completions, {made_by['cut_prompts']} of prompts that lost their beginning")
        print(file, flush=True)


if __name__ == "__main__":
    sys.exit(main())
