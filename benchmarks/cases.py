"""What the benchmarks do alike: a case in a process of its own, the device's name, the files of results."""

import argparse
import gc
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_parts.findings import write_whole
from tqdm import tqdm


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
    measure: Callable[[argparse.Namespace], dict],
    case: dict,
) -> dict:
    """A result row. On a GPU in this process; on a CPU, where memory is the process's, in one of its own.

    names: the options that such a process gets.
    """
    if args.device != "cuda":
        return spawn(script, {name: getattr(args, name) for name in names}, case)
    gc.collect()
    torch.cuda.empty_cache()
    return case | measure(argparse.Namespace(**vars(args) | case))


@dataclass
class Table:
    """The results of one benchmark, on disk after every case: what is stopped keeps the rows it has.

    name: of the files. head: what it has to say beside device, versions and command: of the machine, of all
    rows. report: rows -> Markdown. claims: rows -> targets, with "what", "measured", "target" and "holds".
    """

    args: argparse.Namespace
    name: str
    report: Callable[[list[dict]], str]
    machine: dict
    head: dict
    claims: Callable[[list[dict]], list[dict]] = lambda rows: []

    def fill(
        self,
        cases: Sequence[dict],
        measured: Callable[[Sequence[dict]], Iterable[dict | None]],
        late: Sequence[str] = (),
    ) -> list[dict]:
        """The rows of the cases, written in their order.

        measured: cases -> their rows one by one, None of one that memory does not hold. late: the cases'
        `impl`s that are measured after all others, in this order: what a time limit may cost.
        """
        found: dict[int, dict] = {}
        missing = dict.fromkeys(range(len(cases)), "not reached")
        text = self._write(found, cases, missing)
        turn = {impl: at for at, impl in enumerate(late)}
        order = sorted(missing, key=lambda at: turn.get(cases[at]["impl"], -1))
        rows = measured([cases[at] for at in order])
        for at, row in zip(order, tqdm(rows, total=len(cases), desc=self.name, unit="case"), strict=True):
            if row is None:
                missing[at] = "not enough memory"
            else:
                del missing[at]
                found[at] = row
            text = self._write(found, cases, missing)
        print(text)
        return [found[at] for at in sorted(found)]

    def _write(self, found: dict[int, dict], cases: Sequence[dict], missing: dict[int, str]) -> str:
        rows = [found[at] for at in sorted(found)]
        left = [f"{', '.join(map(str, cases[at].values()))}: {why}." for at, why in missing.items()]
        claims = self.claims(rows)
        lines = [
            f"{c['what']}: {c['measured']}, target {c['target']}: {'met' if c['holds'] else 'not met'}."
            for c in claims
        ]
        parts = [self.report(rows).rstrip(), *lines, *([f"Missing, {line}" for line in left])]
        text = "\n\n".join(parts) + "\n"
        result = self.head | {"rows": rows, "claims": claims, "missing": left}
        write_files(self.args, self.name, text, self.machine, result)
        return text


def within_memory(measure: Callable[[dict], dict], cases: Iterable[dict]) -> Iterator[dict | None]:
    """The rows of the cases, None where a GPU's memory does not hold one."""
    for case in cases:
        try:
            yield measure(case)
        except torch.cuda.OutOfMemoryError:
            yield None


def is_target(args: argparse.Namespace) -> bool:
    """Whether this is the GPU that targets are set for."""
    return args.device == "cuda" and "H100" in torch.cuda.get_device_name()


def claim(what: str, value: float, target: float, unit: str = "", at_most: bool = False) -> dict:
    """A target and whether it is met. unit: "" for a share, or what follows a number."""
    show = (lambda x: f"{x:.3g}{unit}") if unit else (lambda x: f"{x:.1%}")
    bound = f"{'at most' if at_most else 'at least'} {show(target)}"
    holds = value <= target if at_most else value >= target
    return {"what": what, "measured": show(value), "target": bound, "holds": holds}


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
    """As write_files; the text on the terminal too."""
    write_files(args, name, text, machine, result)
    print(text)


def write_files(args: argparse.Namespace, name: str, text: str, machine: dict, result: dict) -> None:
    """name.md and name.json in args.out, or in the device's folder of results.

    machine and result: what this benchmark has to say of the run beside device, versions and command.
    """
    folder = args.out or Path(__file__).parent / "results" / args.device
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"device": args.device, "torch": torch.__version__, "python": platform.python_version()}
    written = {"command": args.command, "machine": versions | {"name": device_name(args)} | machine} | result
    write_whole(folder / f"{name}.md", text)
    write_whole(folder / f"{name}.json", json.dumps(written, indent=1) + "\n")
