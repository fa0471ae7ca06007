"""From a trained run to pass@k: programs sampled by one tool, run apart and counted by the other."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.model.small import small_config
from tools import complete_code, run_code
from xdlm_megatron.checkpoint.integrity import fingerprint
from xdlm_megatron.evaluation.execution import ExecutionError, Sandbox
from xdlm_megatron.evaluation.problems import assemble, question, read_lines
from xdlm_megatron.train.run import train

# What a model writes stands in a string, so that its programs end well whatever it has learned.
EASY = {
    "task_id": "H/0",
    "prompt": 'def one():\n    return 1\n\nx = r"""',
    "test": '"""\ndef check(f):\n    assert f() == 1\n',
    "entry_point": "one",
}
HARD = {**EASY, "task_id": "H/1", "test": '"""\ndef check(f):\n    assert f() == 2\n'}


@pytest.fixture(scope="module")
def run_folder(tiny_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("complete")
    config = small_config(
        tiny_recipe,
        run={"output_dir": str(folder)},
        data={"valid_prefix": None},
        train={"num_steps": 1},
        lr_schedule={"kind": "constant"},
        sampling={"kind": "saber", "temperature": 1.0},
    )
    assert train(config) == "finished"
    with gzip.open(folder / "easy.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(problem) + "\n" for problem in (EASY, HARD)))
    return folder / config.run.name


def complete(monkeypatch: pytest.MonkeyPatch, run: Path, *more: str) -> tuple[int, Path]:
    """The tool's exit status, and its file."""
    arguments = [str(run / "recipe.yaml"), str(run.parent / "easy.jsonl.gz"), "--max-tokens", "6", *more]
    monkeypatch.setattr(sys, "argv", ["complete_code.py", *arguments])
    return complete_code.main(), run / "completions/step_00000001-ema-saber-seed3-easy.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; a line must be a JSON object with task_id"),
        (
            '{"prompt": "def f():"}\n',
            ":1: must be a JSON object with task_id (KeyError('task_id')); correct it",
        ),
    ],
)
def test_problems_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"a\.jsonl") as error:
        read_lines(tmp_path / "a.jsonl", ("task_id",))
    assert str(error.value).endswith(message)


def test_end_to_end(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, path = complete(monkeypatch, run_folder, "--num-samples", "3", "--seed", "3")
    assert status == 0
    lines = read_lines(path, ("task_id", "completion", "network_calls", "made_by"))
    assert [line["task_id"] for line in lines] == ["H/0", "H/1"] * 3
    assert len({line["completion"] for line in lines}) > 3
    assert all(1 <= line["network_calls"] <= 6 for line in lines)
    made_by = lines[0]["made_by"]
    assert (made_by["seed"], made_by["max_tokens"], made_by["sampling"]["kind"]) == (3, 6, "saber")
    assert made_by["checkpoint_hash"] == fingerprint(run_folder / "checkpoints/step_00000001")
    first = path.read_text()
    complete(monkeypatch, run_folder, "--num-samples", "3", "--seed", "3")
    assert path.read_text() == first

    try:
        Sandbox(allow_root=True)
    except ExecutionError as error:
        pytest.skip(f"no namespaces for this user: {error}")
    arguments = [str(run_folder.parent / "easy.jsonl.gz"), str(path), "--execute", "--allow-root"]
    monkeypatch.setattr(sys, "argv", ["run_code.py", *arguments, "--k", "1", "3"])
    assert run_code.main() == 0
    assert "pass@3  0.5000 +- 0.5000 of 2 problems" in capsys.readouterr().out
    record = json.loads(path.with_suffix(".results.json").read_text())
    assert record["outcomes"] == {"passed": 3, "failed": 3, "timed out": 0}
    assert record["made_by"] == [made_by]


def test_mistakes(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complete(monkeypatch, run_folder, "--num-samples", "0")[0] == 2
    assert "--num-samples 0" in capsys.readouterr().err
    (run_folder.parent / "easy.jsonl.gz").rename(run_folder.parent / "gone.gz")
    assert complete(monkeypatch, run_folder)[0] == 2
    assert "complete_code: error: " in capsys.readouterr().err


def test_what_is_asked_and_what_is_run() -> None:
    mbpp = {"task_id": 2, "text": "Write twice.", "test_list": ["assert twice(2) == 4"]}
    assert question(EASY)[0] == EASY["prompt"]
    text, stops = question(mbpp)
    assert text == '"""\nWrite twice.\nassert twice(2) == 4\n"""\n'
    assert "\nassert" in stops
    assert assemble(mbpp, "def twice(x): return 2 * x") == (
        "def twice(x): return 2 * x\n\nassert twice(2) == 4\n"
    )
    with pytest.raises(ValueError, match="neither 'entry_point'"):
        question({"task_id": 3})
