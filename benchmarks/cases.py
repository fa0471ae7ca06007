"""What the benchmarks do alike: a case in a process of its own, the device's name, the files of results."""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def spawn(script: str, options: dict, case: dict) -> dict:
    """`script --measure` with the options and the case's; the case with what it printed, as a result row.

    A process of its own, because peak memory is a process's.
    """
    command = [sys.executable, script, "--measure"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in (options | case).items()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return case | json.loads(done.stdout.splitlines()[-1])


def run_case(
    script: str,
    args: argparse.Namespace,
    names: Sequence[str],
    case: dict,
    measure: Callable[[argparse.Namespace], dict],
) -> dict:
    """A result row. On a GPU in this process; on a CPU, where memory is the process's, in one of its own.

    names: the options that such a process gets.
    """
    if args.device != "cuda":
        return spawn(script, {name: getattr(args, name) for name in names}, case)
    result = measure(argparse.Namespace(**vars(args) | case))
    torch.cuda.empty_cache()
    return case | result


def split_impls(
    args: argparse.Namespace, need_gpu: dict[str, str], try_one: Callable[[str], object]
) -> tuple[list[str], dict[str, str]]:
    """(those of args.impls that are measured, why the others are not). need_gpu: what they are; try_one
    raises where one cannot be had.
    """
    left_out = {}
    for impl in args.impls:
        if impl in need_gpu and args.device != "cuda":
            left_out[impl] = f"{need_gpu[impl]}, which need a GPU"
        elif impl in need_gpu:
            try:
                try_one(impl)
            except (ImportError, ValueError) as error:
                left_out[impl] = str(error)
    return [impl for impl in args.impls if impl not in left_out], left_out


def device_name(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return (
        f"CPU {models[0].split(':')[1].strip() if models else platform.machine()}, {args.threads} thread(s)"
    )


def write_results(args: argparse.Namespace, name: str, text: str, machine: dict, result: dict) -> None:
    """name.md and name.json in args.out, or in the device's folder of results; the text on the terminal too.

    machine and result: what this benchmark has to say of the run beside device, versions and command.
    """
    folder = args.out or Path(__file__).parent / "results" / args.device
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    versions = {"device": args.device, "torch": torch.__version__, "python": platform.python_version()}
    written = {"command": args.command, "machine": versions | {"name": device_name(args)} | machine} | result
    (folder / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
    print(text)
