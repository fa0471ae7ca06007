"""Draw the losses of one or more runs from their metrics.jsonl.

    python tools/plot_run.py RUN_DIR [RUN_DIR ...] [--out loss.png] [--reference "unigram entropy=6.91" ...]

A single run is drawn to RUN_DIR/figures/loss.png unless --out says otherwise.
"""

import argparse
import math
import sys
from pathlib import Path

from xdlm_megatron.tracking.plot import draw_runs, read_run, save_figure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="file to write; its extension chooses PNG, SVG or PDF")
    parser.add_argument(
        "--reference", action="append", default=[], metavar="NAME=VALUE", help="a line, in nats per token"
    )
    options = parser.parse_args()
    try:
        references = dict(map(parse_reference, options.reference))
        out = options.out or default_out(options.run_dirs)
        runs = dict(zip(short_names(options.run_dirs), map(read_run, options.run_dirs), strict=True))
        out.parent.mkdir(parents=True, exist_ok=True)
        save_figure(draw_runs(runs, references), out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def parse_reference(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"--reference {text!r} is not NAME=VALUE with a number in nats per token")
    return name.strip(), number


def default_out(run_dirs: list[Path]) -> Path:
    if len(run_dirs) > 1:
        raise ValueError("several runs in one picture need --out FILE.png")
    return run_dirs[0] / "figures" / "loss.png"


def short_names(run_dirs: list[Path]) -> list[str]:
    """Folder names, or whole paths where two folders have the same name."""
    names = [path.resolve().name for path in run_dirs]
    if len(set(names)) == len(names):
        return names
    paths = [str(path) for path in run_dirs]
    if len(set(paths)) < len(paths):
        raise ValueError("a run folder is given twice")
    return paths


if __name__ == "__main__":
    sys.exit(main())
