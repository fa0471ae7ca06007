"""Run a model's programs against the tests of problems, and estimate pass@k. Executes what a model wrote.

    python tools/run_code.py PROBLEMS.jsonl[.gz] COMPLETIONS.jsonl --execute [--k 1 10]

PROBLEMS, as HumanEval has them: {task_id, prompt, test, entry_point}, or as MBPP: {task_id, test_list,
[test_setup_code]}. COMPLETIONS: {task_id, completion} a line, several of a task, as tools/complete_code.py
writes them. Writes COMPLETIONS.results.json. Nothing runs without --execute. Exit status: 0 done, 2 a
mistake of the user.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xdlm_megatron.evaluation.execution import Limits, Outcome, Sandbox, pass_at_k
from xdlm_megatron.evaluation.problems import assemble, read_lines
from xdlm_megatron.evaluation.records import mean_of, write_record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("problems", type=Path)
    parser.add_argument("completions", type=Path)
    parser.add_argument("--execute", action="store_true", help="yes, run what the model wrote")
    parser.add_argument("--allow-root", action="store_true", help="also as root; programs run as nobody")
    parser.add_argument("--k", type=int, nargs="+", default=[1], help="of pass@k (default 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for a program (default 10)")
    parser.add_argument("--memory-mib", type=int, default=1024, help="for a program (default 1024)")
    options = parser.parse_args()
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"run_code: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Reads, runs, prints and writes. Raises ValueError."""
    if not options.execute:
        raise ValueError("this runs programs that a model wrote; add --execute to say that you want it")
    problems = {str(each["task_id"]): each for each in read_lines(options.problems, ("task_id",))}
    completions = read_lines(options.completions, ("task_id", "completion"))
    counts = {name: sum(str(each["task_id"]) == name for each in completions) for name in problems}
    unknown = [each["task_id"] for each in completions if str(each["task_id"]) not in problems]
    if unknown or not problems:
        raise ValueError(f"{options.completions}: task {unknown[:1]} is not in {options.problems}")
    for k in options.k:  # before anything runs
        for name, number in counts.items():
            if not 1 <= k <= number:
                raise ValueError(f"pass@{k} needs {k} completions of each task, and {name} has {number}")
    sandbox = Sandbox(
        Limits(seconds=options.seconds, memory_mib=options.memory_mib), allow_root=options.allow_root
    )
    results = []
    for each in tqdm(completions, desc="programs", disable=None):
        found = sandbox.run(assemble(problems[str(each["task_id"])], each["completion"]))
        results.append({"task_id": each["task_id"], "outcome": found.outcome.value, "error": found.error})
    made_by = [each["made_by"] for each in completions if "made_by" in each]
    made_by = [each for n, each in enumerate(made_by) if each not in made_by[:n]]
    record = {"made_by": made_by} | summarise(options, sandbox.interpreter, counts, results)
    written = options.completions.with_suffix(".results.json")
    write_record(written, record)
    for name, value in record["pass_at_k"].items():
        print(f"pass@{name}  {value['mean']:.4f} +- {value['standard_error']:.4f} of {len(counts)} problems")
    print(written)


def summarise(
    options: argparse.Namespace, interpreter: str, counts: dict[str, int], results: list[dict[str, Any]]
) -> dict[str, Any]:
    """pass@k over problems, with the standard error over them."""
    passed = {
        name: sum(each["outcome"] == Outcome.PASSED.value for each in results if str(each["task_id"]) == name)
        for name in counts
    }
    found = {k: mean_of([pass_at_k(counts[name], passed[name], k) for name in counts]) for k in options.k}
    return {
        "problems": str(options.problems),
        "completions": str(options.completions),
        "completions_sha256": hashlib.sha256(options.completions.read_bytes()).hexdigest(),
        "limits": {"seconds": options.seconds, "memory_mib": options.memory_mib},
        "interpreter": interpreter,
        "pass_at_k": {str(k): value._asdict() for k, value in found.items()},
        "outcomes": {o.value: sum(each["outcome"] == o.value for each in results) for o in Outcome},
        "results": results,
    }


if __name__ == "__main__":
    sys.exit(main())
