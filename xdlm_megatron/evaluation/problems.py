"""Programming problems in HumanEval's form and MBPP's: what a model is asked, and the program that is run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

# Where a completion ends: Chen et al. 2021, section 2.1, and for MBPP, whose functions a model writes whole,
# what can only come behind one.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif")


def read_lines(path: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """JSON objects, one a line, that have these names; .gz too.

    Raises ValueError with file and line, or where there is none.
    """
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    found = []
    with opened as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                found.append({**record, **{name: record[name] for name in names}})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: must be a JSON object with {', '.join(names)} ({error!r}); correct it"
                ) from None
    if not found:
        raise ValueError(f"{path} is empty; a line must be a JSON object with {', '.join(names)}")
    return found


def question(problem: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The text that a model continues, and where its continuation ends. Raises ValueError."""
    if is_humaneval(problem):
        return str(problem["prompt"]), HUMANEVAL_STOPS
    words = problem.get("text", problem.get("prompt", ""))
    return "\n".join(['"""', words, *problem["test_list"], '"""', ""]), MBPP_STOPS


def assemble(problem: dict[str, Any], completion: str) -> str:
    """A program that ends well where the completion passes the problem's tests. Raises ValueError."""
    if is_humaneval(problem):
        solution = f"{problem['prompt']}{completion}"
        return f"{solution}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    return "\n".join([completion, problem.get("test_setup_code", ""), *problem["test_list"], ""])


def is_humaneval(problem: dict[str, Any]) -> bool:
    """Or MBPP. Raises ValueError where it is neither's form."""
    if "entry_point" not in problem and "test_list" not in problem:
        raise ValueError(
            f"problem {problem['task_id']} has neither 'entry_point' (HumanEval) nor 'test_list' (MBPP)"
        )
    return "entry_point" in problem
