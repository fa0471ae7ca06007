"""Show what the model reads at a step: the noised tokens below the clean ones. Needs no model and no GPU.

    python tools/show_batch.py runs/quickstart/recipe.yaml --step 7 --samples 2
    python tools/show_batch.py RECIPE.yaml diffusion.uniform_ratio=0.5 --valid

What is printed are the bits that training reads at that step, a function of the recipe and the step alone.
Masks are blocks; replaced tokens are yellow, or begin with ~ where there is no terminal or NO_COLOR is set.
"""

import argparse
import os
import shutil
import sys

from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.data.show import load_batch, render_batch
from xdlm_megatron.data.tokenizer import load_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="YAML file, or the recipe.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of the recipe")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--step", type=int, default=1, help="training step, from 1 (default: 1)")
    chosen.add_argument("--valid", action="store_true", help="the held-out set, as every evaluation reads it")
    parser.add_argument("--samples", type=int, default=4, help="sequences to show (default: 4)")
    options = parser.parse_intermixed_args()
    try:
        show(options)
    except BrokenPipeError:  # show_batch | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"show_batch: error: {error}", file=sys.stderr)
        return 2
    return 0


def show(options: argparse.Namespace) -> None:
    """Builds the batch and prints it for this terminal."""
    if options.samples < 1:
        raise ValueError(f"--samples={options.samples} must be at least 1")
    config = load_recipe(options.recipe, options.overrides)
    sample_ids, batch = load_batch(config, None if options.valid else options.step, options.samples)
    print(
        render_batch(
            sample_ids,
            batch,
            load_tokenizer(config.data.tokenizer).token_strings,
            config.data.mask_id,
            width=shutil.get_terminal_size((100, 24)).columns,
            colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"),
        ),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
