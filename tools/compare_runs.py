"""Compare one metric of two runs, step by step, from their metrics.jsonl.

    python tools/compare_runs.py RUN_A RUN_B [--metric train/grad_norm] [--tolerance 2e-5] [--out compare.png]

Prints the first step that differs at all, the first that differs by more than the tolerance (relative), the
largest differences and the steps that only one run has. Exit status: 0 the same steps with the same values,
within the tolerance, 1 different, 2 a mistake of the user.
"""

import argparse
import sys
from pathlib import Path

from xdlm_megatron.tracking.compare import Comparison, Point, compare_curves
from xdlm_megatron.tracking.plot import TRAIN_LOSS, draw_comparison, read_run, save_figure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_a", type=Path, metavar="RUN_A")
    parser.add_argument("run_b", type=Path, metavar="RUN_B")
    parser.add_argument(
        "--metric", default=TRAIN_LOSS, help=f"a name in metrics.jsonl (default: {TRAIN_LOSS})"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="relative difference that counts as equal (default: 0)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    options = parser.parse_args()
    try:
        return compare(options)
    except (ValueError, OSError) as error:
        print(f"compare_runs: error: {error}", file=sys.stderr)
        return 2


def compare(options: argparse.Namespace) -> int:
    """Reports, draws and returns the exit status."""
    if not 0 <= options.tolerance < float("inf"):
        raise ValueError(f"--tolerance={options.tolerance} must be a number of at least 0, such as 2e-5")
    found = compare_curves(read_run(options.run_a), read_run(options.run_b), options.metric)
    for line in report(found, options):
        print(line)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        names = (str(options.run_a), str(options.run_b))
        save_figure(draw_comparison(found, names, options.metric, options.tolerance), options.out)
        print(options.out)
    beyond = found.first_beyond(options.tolerance)
    return 1 if beyond or found.only_a or found.only_b else 0


def report(found: Comparison, options: argparse.Namespace) -> list[str]:
    """What differs, in lines."""
    steps = [point.step for point in found.points]
    lines = [f"{options.metric}: {len(steps)} common steps, {steps[0]} to {steps[-1]}"]
    first = found.first_beyond(0.0)
    if first is None:
        lines.append("  the same bits at every one of them")
    else:
        lines.append(f"  first different     {show(first)}")
        if options.tolerance:
            beyond = found.first_beyond(options.tolerance)
            lines.append(f"  first beyond {options.tolerance:<7g}{show(beyond) if beyond else 'none'}")
        lines.append(f"  largest absolute    {show(found.largest_absolute)}")
        lines.append(f"  largest relative    {show(found.largest_relative)}")
    for name, only in ((options.run_a, found.only_a), (options.run_b, found.only_b)):
        if only:
            some = ", ".join(map(str, only[:5])) + (", ..." if len(only) > 5 else "")
            lines.append(f"  {len(only)} steps in {name} alone: {some}")
    return lines


def show(point: Point) -> str:
    return (
        f"step {point.step}: {point.a!r} and {point.b!r}, "
        f"difference {point.difference:.3g}, relative {point.relative:.3g}"
    )


if __name__ == "__main__":
    sys.exit(main())
