"""Programs of a model: what they can do, and what they cannot."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import psutil
import pytest

from tools import run_code
from xdlm_megatron.evaluation.execution import ExecutionError, Limits, Outcome, Sandbox, pass_at_k


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(Limits(seconds=3, memory_mib=512), allow_root=True)
    except ExecutionError as error:
        pytest.skip(f"no namespaces for this user: {error}")


@pytest.mark.parametrize(
    ("program", "outcome", "error"),
    [
        ("assert 1 + 1 == 2", Outcome.PASSED, ""),
        ("assert 1 + 1 == 3, 'no'", Outcome.FAILED, "AssertionError: no"),
        ("def f(:", Outcome.FAILED, "SyntaxError"),
        ("while True: pass", Outcome.TIMED_OUT, "no end after 3 s"),
        ("x = bytearray(1 << 30)", Outcome.FAILED, "MemoryError"),
        ("open('big', 'wb').write(bytes(9 << 20))", Outcome.FAILED, "File too large"),
        ("import os; assert not os.environ.get('HOME')", Outcome.PASSED, ""),
        ("import os; assert os.listdir() == ['program.py'] or len(os.listdir()) == 2", Outcome.PASSED, ""),
        (
            "import socket; socket.create_connection(('1.1.1.1', 80), 1)",
            Outcome.FAILED,
            "Network is unreachable",
        ),
        ("import sys; sys.stdin.read(); raise SystemExit(3)", Outcome.FAILED, "exit status 3"),
    ],
)
def test_outcomes(program: str, outcome: Outcome, error: str, sandbox: Sandbox) -> None:
    found = sandbox.run(program)
    assert found.outcome is outcome, found
    assert error in found.error


def test_what_it_starts_dies_with_it(sandbox: Sandbox, tmp_path: Path) -> None:
    """Also a grandchild in a session of its own, which no signal to a group reaches."""
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.execvp('sleep', ['sleep', '3131.25'])\n"
        "time.sleep(0.3)\n"
    )
    assert sandbox.run(program).outcome is Outcome.PASSED
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any("3131.25" in (p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
            return
        time.sleep(0.05)
    pytest.fail("a process outlived its program")


def test_root_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ExecutionError, match="not run as root"):
        Sandbox()


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (5, 3, 5)])
def test_pass_at_k_by_enumeration(n: int, c: int, k: int) -> None:
    outcomes = [True] * c + [False] * (n - c)
    subsets = list(combinations(outcomes, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_more_samples_than_there_are() -> None:
    with pytest.raises(ValueError, match="pass@3 needs 1 to 2 samples"):
        pass_at_k(2, 1, 3)


PROBLEMS = (
    '{"task_id": "H/0", "prompt": "def add(a, b):\\n", "entry_point": "add", '
    '"test": "def check(f):\\n    assert f(1, 2) == 3\\n"}\n'
    '{"task_id": 7, "test_list": ["assert twice(2) == 4"], "test_setup_code": ""}\n'
)
COMPLETIONS = (
    '{"task_id": "H/0", "completion": "    return a + b\\n"}\n'
    '{"task_id": "H/0", "completion": "    return a - b\\n"}\n'
    '{"task_id": 7, "completion": "def twice(x): return x + 1"}\n'
    '{"task_id": 7, "completion": "def twice(x): return 2 *"}\n'
)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the tool; returns its exit status."""
    problems, completions = tmp_path / "p.jsonl", tmp_path / "c.jsonl"
    problems.write_text(PROBLEMS)
    completions.write_text(COMPLETIONS)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run_code.py", str(problems), str(completions), *arguments])
        return run_code.main()

    return run


def test_the_tool(
    sandbox: Sandbox, tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HumanEval's form and MBPP's; half of the first problem's programs pass, none of the second's."""
    assert tool("--execute", "--allow-root", "--k", "1", "2") == 0
    said = capsys.readouterr().out
    assert "pass@1  0.2500 +- 0.2500 of 2 problems" in said
    assert "pass@2  0.5000 +- 0.5000 of 2 problems" in said
    record = json.loads((tmp_path / "c.results.json").read_text())
    assert record["outcomes"] == {"passed": 1, "failed": 3, "timed out": 0}
    assert [each["outcome"] for each in record["results"]] == ["passed", "failed", "failed", "failed"]
    assert record["limits"]["seconds"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "add --execute to say that you want it"),
        (["--execute", "--k", "3"], "pass@3 needs 3 completions of each task, and H/0 has 2"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tool: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tool(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c.results.json").exists()
