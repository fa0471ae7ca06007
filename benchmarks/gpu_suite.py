"""One command that shows what this package does on one GPU: what works, what agrees, how fast, in how much.

    python benchmarks/gpu_suite.py                        # one GPU, no network, under 9 minutes
    python benchmarks/gpu_suite.py --resume               # the parts that are not ok yet
    python benchmarks/gpu_suite.py --only speed losses    # these anew; what the report has of others stays
    python benchmarks/gpu_suite.py --device cpu --tiny    # a rehearsal: the same way on tiny sizes
    python benchmarks/gpu_suite.py --list                 # the parts, with their minutes

Each part is a process with a time limit of its own; one that fails or hangs leaves what it measured so far
and a reason, and the next one runs. The report is written before and after each part, to
benchmarks/results/<device>/report.md and report.json, of a rehearsal to its work folder; logs are in the work
folder. Exit status: 0 if every part is ok, 1 if one is not, 2 where the suite cannot start.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import sys
import time
from pathlib import Path

from gpu_parts.running import OK, Part, Suite, load_records

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MINUTES = 8.75
REHEARSAL_MINUTES = 60
VERSIONS = Part("versions", "Versions, and the kernels built", "-m gpu_parts.versions", 25, 90, "--tiny")
PARTS = (
    VERSIONS,
    Part("parity", "Kernels against their twins", "-m gpu_parts.parity", 60, 120, "--tiny"),
    Part("engines", "Transformer Engine against PyTorch", "-m gpu_parts.engines", 25, 60, "--tiny"),
    Part("speed", "1B in bfloat16 and FP8: speed and memory", "-m gpu_parts.speed", 90, 150, "--tiny"),
    Part("losses", "160M in bfloat16 and FP8 from one state", "-m gpu_parts.losses", 100, 150, "--tiny"),
    Part(
        "kernel_nelbo",
        "Loss and gradient from logits",
        "benchmarks/kernel_nelbo.py --vocab 32768 131072",
        45,
        90,
        "--tokens 16 --batch 2 --vocab 256 --repeats 1",
    ),
    Part(
        "head_loss",
        "Output head and loss",
        "benchmarks/head_loss.py",
        40,
        80,
        "--tokens 16 --batch 2 --vocab 256 --hidden 8 --repeats 1 --impls logits fused",
    ),
    Part(
        "kernel_posterior",
        "One sampling step",
        "benchmarks/kernel_posterior.py --vocabularies 131072 --dtypes bfloat16",
        45,
        90,
        "--tokens 256 --batch 2 --vocabularies 1024 --repeats 1",
    ),
    Part(
        "sampling",
        "Sampling against the dense posterior",
        "benchmarks/sampling.py --layers 12 --hidden 768 --dtype bfloat16 --tokens 4096 --batch 4",
        30,
        60,
        "--layers 1 --hidden 16 --vocab 256 --tokens 16 --batch 2 --steps 2 --dtype float32",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal; goes with --device cpu")
    parser.add_argument("--minutes", type=float, help=f"all of it [{MINUTES}]; then it stops")
    parser.add_argument("--only", nargs="+", choices=[p.name for p in PARTS], help="these parts anew [all]")
    parser.add_argument("--resume", action="store_true", help="keep the parts that are ok in the report")
    parser.add_argument("--out", type=Path, help="folder of the report [benchmarks/results/<device>]")
    parser.add_argument("--work", type=Path, help="folder of logs and data [runs/gpu_suite]")
    parser.add_argument("--list", action="store_true", help="show the parts and stop")
    args = parser.parse_args()
    if args.list:
        print_plan()
        return 0
    if args.tiny != (args.device == "cpu"):
        parser.error("--device cpu and --tiny go together: a rehearsal; a GPU takes the real sizes")
    stop_on_sigterm()
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Names the device by the first part, then runs the others into its folder."""
    started = time.monotonic()
    rehearsal = args.device == "cpu"
    work = (args.work or ROOT / "runs" / ("gpu_suite_rehearsal" if rehearsal else "gpu_suite")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    head = {
        "device": args.device,
        "rehearsal": rehearsal,
        "command": " ".join(["python", "benchmarks/gpu_suite.py", *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "identity": {},
    }
    python = [sys.executable, "-u"]
    minutes = args.minutes or (REHEARSAL_MINUTES if rehearsal else MINUTES)
    common = (python, environment(args.device), ROOT, 60 * minutes, rehearsal)
    first = Suite(head, work / "start", work, *common)
    if not first.run([VERSIONS], {}, started):
        print(f"error: {first.records[0].reason}; see {work / 'start' / 'report.md'}", file=sys.stderr)
        return 2
    facts = first.records[0].result["facts"]
    head |= {"device": facts["device"], "identity": facts["identity"]}
    out = args.out or (work if rehearsal else HERE / "results" / folder_name(facts["device"]))
    kept = load_records(out / "report.json", head["identity"]) if args.resume or args.only else {}
    kept = {name: record for name, record in kept.items() if name not in (args.only or ())}
    kept[VERSIONS.name] = first.records[0]
    suite = Suite(head, out.absolute(), work, *common)
    complete = suite.run(PARTS, kept, started, args.only)
    print(f"{sum(r.status == OK for r in suite.records)} of {len(PARTS)} parts ok: {out / 'report.md'}")
    return 0 if complete else 1


def stop_on_sigterm() -> None:
    """As Ctrl-C does: the part that runs is ended too, and the report says so."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def environment(device: str) -> dict[str, str]:
    """Of the parts: this checkout's package and benchmarks, and no GPU in a rehearsal."""
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    found = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    found["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # less lost to fragments
    found["PYTHONWARNINGS"] = "ignore"  # of a part that fails the log's end is shown
    if device == "cpu":
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


def folder_name(device: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia_h100_80gb_hbm3"""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def print_plan() -> None:
    for part in PARTS:
        print(f"{part.name:<18}{part.expected:>4.0f} s of at most {part.limit:>4.0f}   {part.title}")
    total = sum(part.expected for part in PARTS)
    print(f"{'together':<18}{total:>4.0f} s expected on an H100 ({total / 60:.1f} minutes)")


if __name__ == "__main__":
    sys.exit(main())
