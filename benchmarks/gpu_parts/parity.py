"""The kernels against their readable twins: the tests marked gpu, in a rehearsal a few of the host build."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from gpu_parts.findings import Findings, part_parser

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/unit/kernels"  # alone: other tests import packages that a GPU node may lack
WORKERS = 4  # processes on one GPU; the tests wait for the CPU's float64 most of the time
REHEARSAL = ("tests/unit/kernels/test_posterior_kernel.py", "-k", "host and twin")


def main() -> None:
    args = part_parser(__doc__).parse_args()
    found = Findings(args.out, "parity", "Kernels against their twins")
    junit = args.out / "parity.xml"
    junit.unlink(missing_ok=True)
    status = run_tests(args.tiny, junit)
    if not junit.exists():
        raise SystemExit(f"error: pytest ended with {status} and wrote no result")
    outcomes = read_outcomes(junit)
    for file, counts in outcomes.items():
        found.row("", file=file, **{name: counts[name] for name in ("passed", "failed", "skipped")})
    total = sum(outcomes.values(), Counter())
    holds = total["passed"] > 0 and total["failed"] == 0 and status == 0
    text = f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped"
    if not found.claim("kernels agree with their twins", text, "all tests pass, at least one", holds):
        raise SystemExit(f"error: {text}")


def run_tests(is_tiny: bool, junit: Path) -> int:
    """pytest's exit status; what it prints goes to this part's log."""
    chosen = [*REHEARSAL] if is_tiny else [TESTS, "-m", "gpu"]
    if not is_tiny and importlib.util.find_spec("xdist"):
        chosen += ["-n", str(WORKERS), "--dist", "load"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *chosen]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def read_outcomes(junit: Path) -> dict[str, Counter[str]]:
    """Test file -> how many of its tests passed, failed (errors among them), were skipped."""
    outcomes: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes.setdefault(case.get("classname") or "?", Counter())[kind] += 1
    return outcomes


if __name__ == "__main__":
    main()
