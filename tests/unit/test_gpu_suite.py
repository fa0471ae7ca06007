"""How the GPU suite runs parts that fail, hang and are stopped; and its own parts, tiny."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

FOUND = """
import argparse, sys
from pathlib import Path
from gpu_parts.findings import Findings
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
found = Findings(parser.parse_args().out, Path(__file__).stem, "A part")
found.row("Rows", x=1, y=None)
"""
GOOD = FOUND + 'found.claim("fast", "2x", "at least 1x", True)\nprint("well")\n'
FAILS = FOUND + 'found.row("Rows", x=2, y=0.5)\nprint("Error: no such kernel", flush=True)\nsys.exit(3)\n'
HANGS = (
    FOUND
    + """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(__file__).with_suffix(".pid").write_text(str(child.pid))
time.sleep(600)
"""
)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """gpu_parts/running.py, impatient."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu_parts.running")
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(module, "WORTH_STARTING_SECONDS", 0.5)
    return module


def make_suite(running: ModuleType, folder: Path, budget: float = 60) -> Any:
    head = {
        "device": "none",
        "rehearsal": True,
        "command": "a test",
        "started": "now",
        "identity": {"v": "1"},
    }
    environment = dict(os.environ) | {"PYTHONPATH": str(BENCHMARKS)}
    (folder / "work").mkdir(exist_ok=True)
    return running.Suite(
        head,
        folder / "out",
        folder / "work",
        [sys.executable],
        environment,
        folder,
        budget,
        say=str,
    )


def part(running: ModuleType, folder: Path, name: str, source: str, limit: float = 30) -> Any:
    path = folder / f"{name}.py"
    path.write_text(source)
    return running.Part(name, f"Part {name}", str(path), 1, limit)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_parts_that_fail_or_hang_keep_what_they_found(running: ModuleType, tmp_path: Path) -> None:
    suite = make_suite(running, tmp_path)
    parts = [part(running, tmp_path, "fails", FAILS), part(running, tmp_path, "hangs", HANGS, limit=1.5)]
    parts += [part(running, tmp_path, "silent", ""), part(running, tmp_path, "good", GOOD)]
    assert not suite.run(parts, {}, time.monotonic())
    report = json.loads((tmp_path / "out/report.json").read_text())
    fails, hangs, silent, good = report["parts"]
    assert [p["status"] for p in report["parts"]] == ["failed", "timed out", "failed", "ok"]
    assert fails["reason"].startswith("exit status 3: Error: no such kernel")
    assert fails["result"]["tables"]["Rows"] == [{"x": 1, "y": None}, {"x": 2, "y": 0.5}]
    assert hangs["result"]["tables"]["Rows"] == [{"x": 1, "y": None}]
    assert 1.5 <= hangs["seconds"] < 20
    assert not is_alive(int((tmp_path / "hangs.pid").read_text()))  # what it started went with it
    assert silent["reason"] == "it ended well and wrote no result"
    assert good["result"]["claims"][0]["holds"]
    text = (tmp_path / "out/report.md").read_text()
    assert "**1 of 4 parts are ok.** Not ok: fails (failed), hangs (timed out), silent (failed)." in text
    assert "| 2 | 0.5 |" in text
    assert "rehearsal on a CPU" in text
    assert "| good | fast | 2x | at least 1x | met |" in text


def test_a_resume_runs_what_is_not_ok(running: ModuleType, tmp_path: Path) -> None:
    count = "\nPath(__file__).with_suffix('.count').open('a').write('x')\n"
    parts = [part(running, tmp_path, "good", GOOD + count), part(running, tmp_path, "mends", FAILS)]
    assert not make_suite(running, tmp_path).run(parts, {}, time.monotonic())
    report = tmp_path / "out/report.json"
    assert running.load_records(report, {"v": "2"}) == {}  # of another version
    kept = running.load_records(report, {"v": "1"})
    assert kept.keys() == {"good"}
    part(running, tmp_path, "mends", GOOD)
    assert make_suite(running, tmp_path).run(parts, kept, time.monotonic())
    assert (tmp_path / "good.count").read_text() == "x"
    assert "All 2 parts are ok." in (tmp_path / "out/report.md").read_text()
    assert make_suite(running, tmp_path).run(parts, {}, time.monotonic(), only=["mends"])
    assert "**1 of 2 parts are ok.** Not ok: good (not started)" in (tmp_path / "out/report.md").read_text()


def test_the_budget_ends_a_part_and_leaves_out_the_rest(running: ModuleType, tmp_path: Path) -> None:
    parts = [part(running, tmp_path, "hangs", HANGS), part(running, tmp_path, "good", GOOD)]
    suite = make_suite(running, tmp_path, budget=1.5)
    began = time.monotonic()
    assert not suite.run(parts, {}, began)
    assert time.monotonic() - began < 20
    hangs, good = suite.records
    assert (hangs.status, good.status) == ("timed out", "not started")
    assert "--resume" in good.reason


def test_a_stop_ends_the_part_and_says_so(running: ModuleType, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys, time; from pathlib import Path; import gpu_suite\n"
        "from gpu_parts import running; running.GRACE_SECONDS = 0.2\n"
        "folder = Path(sys.argv[1]); gpu_suite.stop_on_sigterm()\n"
        "head = dict(device='none', rehearsal=True, command='', started='', identity={})\n"
        "part = running.Part('hangs', 'Hangs', str(folder / 'hangs.py'), 1, 60)\n"
        "env = gpu_suite.environment('cpu')\n"
        "suite = running.Suite(head, folder / 'out', folder, [sys.executable], env, folder, 60)\n"
        "suite.run([part], {}, time.monotonic())\n"
    )
    (tmp_path / "hangs.py").write_text(HANGS)
    environment = dict(os.environ) | {"PYTHONPATH": str(BENCHMARKS)}
    with subprocess.Popen([sys.executable, str(driver), str(tmp_path)], env=environment) as process:
        pid = wait_for(tmp_path / "hangs.pid")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not is_alive(pid)
    (record,) = json.loads((tmp_path / "out/report.json").read_text())["parts"]
    assert (record["status"], record["reason"]) == ("interrupted", "the suite was stopped while it ran")
    assert record["result"]["tables"]["Rows"] == [{"x": 1, "y": None}]


def wait_for(path: Path) -> int:
    for _ in range(600):
        if path.exists() and (text := path.read_text()):
            return int(text)
        time.sleep(0.1)
    raise TimeoutError(path)


# The command and its parts


@pytest.fixture
def parts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("parts_path")
def test_it_fits_into_its_minutes_and_every_script_is_there() -> None:
    suite = importlib.import_module("gpu_suite")
    assert sum(part.expected for part in suite.PARTS) < 60 * suite.MINUTES < 9 * 60
    for part in suite.PARTS:
        script, *rest = part.command.split()
        path = BENCHMARKS / rest[0].replace(".", "/") if script == "-m" else BENCHMARKS.parent / script
        assert path.with_suffix(".py").is_file()
        assert part.tiny, "a rehearsal has tiny sizes"
    assert suite.folder_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_a_rehearsal_is_one_and_touches_no_results(tmp_path: Path) -> None:
    script = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--device", "cpu"]
    refused = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert "go together" in refused.stderr
    command = [*script, "--tiny", "--only", "versions", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal on a CPU" in (tmp_path / "report.md").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rehearsal"]
    assert report["identity"]["device"].startswith("CPU")


@pytest.mark.usefixtures("parts_path")
def test_speed_and_memory_of_a_tiny_recipe(tmp_path: Path) -> None:
    speed = importlib.import_module("gpu_parts.speed")
    training = importlib.import_module("gpu_parts.training")
    recipe = training.prepare(tmp_path, "speed", "xdlm_1b.yaml", True, [training.FLOAT32])
    result = speed.measure(recipe)
    held, plan = result["held_gib"], result["plan_gib"]
    for name in ("weights", "gradients", "optimizer", "ema"):
        assert held[name] == pytest.approx(plan[name], rel=1e-6)
    assert result["tokens_per_second"] * result["seconds_per_step"] == pytest.approx(4 * 32)


@pytest.mark.usefixtures("parts_path")
@pytest.mark.parametrize("difference", [0.0, 1e-7])
def test_losses_from_one_checkpoint_are_compared_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], difference: float
) -> None:
    """Two real runs of this process; the second one is told to differ, or not."""
    losses = importlib.import_module("gpu_parts.losses")

    def run_here(arguments: list[str], on_line: Any) -> None:
        loads = "--load" in arguments
        load = Path(arguments[arguments.index("--load") + 1]) if loads else None
        recipe = arguments[arguments.index("--measure") + 1 :]
        losses.measure(recipe, load, losses.TINY_BEFORE, losses.TINY_COMPARED)
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("{"):
                read = json.loads(line)
                on_line(read | {"loss": read["loss"] * (1 + difference * loads)})

    monkeypatch.setattr(losses, "run_child", run_here)
    monkeypatch.setattr(sys, "argv", ["losses", "--tiny", "--out", str(tmp_path)])
    if difference:
        with pytest.raises(SystemExit, match="largest difference"):
            losses.main()
    else:
        losses.main()
    found = json.loads((tmp_path / "losses.json").read_text())
    (rows,) = found["tables"].values()
    assert [row["step"] for row in rows] == [3, 4, 5]
    assert found["claims"][0]["holds"] == (difference == 0)


@pytest.mark.usefixtures("parts_path")
def test_engines_are_compared_with_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = importlib.import_module("gpu_parts.engines")
    assert (
        engines.twin_name("layers.0.mlp.linear_fc1.layer_norm_weight") == "layers.0.pre_mlp_layernorm.weight"
    )
    monkeypatch.setattr(sys, "argv", ["engines", "--tiny", "--out", str(tmp_path)])
    engines.main()
    (rows,) = json.loads((tmp_path / "engines.json").read_text())["tables"].values()
    assert [row["layers by"] for row in rows] == list(engines.TINY_CASES)[1:]
    assert all(1e-3 < row["logits"] < 0.1 for row in rows)  # bfloat16's rounding, and no more
    worse = dict(engines.TINY_CASES) | {"other": ["model.rotary_base=500"]}
    worse.pop("PyTorch, bfloat16, again")
    monkeypatch.setattr(engines, "TINY_CASES", worse)
    with pytest.raises(SystemExit, match="further from float32"):
        engines.main()


@pytest.mark.usefixtures("parts_path")
def test_outcomes_of_pytest_are_counted(tmp_path: Path) -> None:
    parity = importlib.import_module("gpu_parts.parity")
    marked = [
        p
        for p in (ROOT / "tests").rglob("*.py")
        if "pytest.mark.gpu" in p.read_text() and p != Path(__file__)
    ]
    assert marked
    assert all(p.is_relative_to(ROOT / parity.TESTS) for p in marked)  # the suite runs every one of them
    cases = ['<testcase classname="a"/>'] * 2 + ['<testcase classname="a"><failure/></testcase>']
    cases += ['<testcase classname="b"><skipped/></testcase>', '<testcase classname="b"><error/></testcase>']
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    outcomes = parity.read_outcomes(tmp_path / "junit.xml")
    assert outcomes == {"a": {"passed": 2, "failed": 1}, "b": {"skipped": 1, "failed": 1}}
