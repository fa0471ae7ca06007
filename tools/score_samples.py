"""Score files of samples: generative perplexity and bits per byte, beside what a low perplexity may hide.

    python -m xdlm_megatron sample RECIPE --num-samples 64
    python tools/score_samples.py runs/NAME/samples/*.json [--scorer FOLDER [--mauve]]

Writes NAME.scores.json beside each, with the settings, seed and checkpoint of its samples. The reference
is as much of the run's held-out text. --scorer: a causal language model of Hugging Face as a local folder (or
a .gguf file); without it no perplexities. --mauve: MAUVE besides, by that model's features (extra `mauve`).
Exit status: 0 scored, 2 a mistake of the user.
"""

import argparse
import sys
from pathlib import Path

from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.evaluation.mauve import check_mauve, mauve_of
from xdlm_megatron.evaluation.records import write_record
from xdlm_megatron.evaluation.scorer import CausalScorer
from xdlm_megatron.evaluation.scoring import (
    Texts,
    as_table,
    held_out_texts,
    read_samples,
    score_samples,
    to_record,
)

ENDING = ".scores.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("samples", nargs="+", type=Path, metavar="SAMPLES.json")
    parser.add_argument("--scorer", type=Path, metavar="FOLDER", help="a causal language model to judge by")
    parser.add_argument("--mauve", action="store_true", help="MAUVE by the scorer's features (extra `mauve`)")
    parser.add_argument("--device", default="cpu", help="where the scorer runs, such as cuda (default cpu)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the scorer (default float32)"
    )
    parser.add_argument(
        "--recipe", type=Path, help="whose held-out text is the reference (default: the run folder's)"
    )
    options = parser.parse_args()
    try:
        if options.mauve:
            check_mauve(options.scorer)
        paths = [path for path in options.samples if not path.name.endswith(ENDING)]
        files = [(path, read_samples(path)) for path in paths]
        scorer = CausalScorer(options.scorer, options.device, options.dtype) if options.scorer else None
        for path, samples in files:
            reference = find_reference(options.recipe or path.parents[1] / "recipe.yaml", len(samples.ids))
            mauve = mauve_of(scorer, samples.texts, reference and reference.texts) if options.mauve else None
            found = score_samples(samples, reference, scorer, mauve)
            written = path.with_suffix(ENDING)
            write_record(written, to_record(samples, scorer, found))
            print(f"{path}\n{as_table(found)}", *found.warnings, written, sep="\n", flush=True)
    except (ValueError, OSError) as error:
        print(f"score_samples: error: {error}", file=sys.stderr)
        return 2
    return 0


def find_reference(recipe: Path, number: int) -> Texts | None:
    """None where the recipe has no held-out text."""
    config = load_recipe(recipe)
    return None if config.data.valid_prefix is None else held_out_texts(config, number)


if __name__ == "__main__":
    sys.exit(main())
