"""The command line on a trained run: mistakes, and what its verbs leave behind."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import score_samples
from xdlm_megatron.__main__ import main

Mistake = Callable[..., str]


# Training


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_prefix=nowhere/text", "nowhere/text.json: no such manifest"),
        ("data.valid_prefix=nowhere/text", "nowhere/text.json: no such manifest"),
        ("data.tokenizer=nowhere/t.model", "data.tokenizer=nowhere/t.model: no such file"),
        ("data.vocab_size=399", "data.vocab_size=399 must be 400"),
        ("data.seq_length=100000000", "fewer than one sample of seq_length=100000000"),
        ("model.mcore.recompute_granularityy=full", "did you mean 'recompute_granularity'?"),
        ("model.mcore.recompute_granularity=some", "megatron-core refuses this transformer"),
        ("model.mcore.num_layers=3", "model.mcore.num_layers: cannot be set here; set model.num_layers"),
        ("run.output_dir=/proc/nowhere", "/proc/nowhere: No such file or directory; correct the path"),
        ("run.output_dir=/dev/null", "/dev/null/tiny: Not a directory; correct the path"),
    ],
)
def test_training_that_cannot_start(mistake: Mistake, recipe: Path, override: str, message: str) -> None:
    assert message in mistake("train", recipe, override)
    assert not (recipe.parent / "runs").exists()  # nothing is left behind that a second try would trip over


def test_resume_and_overwrite(mistake: Mistake, trained: Path, recipe: Path) -> None:
    assert "holds no run to resume; leave --resume out" in mistake("train", recipe, "--resume")
    assert "add --resume to go on, or choose another run.name" in mistake("train", trained)
    said = mistake("train", trained, "--resume", "run.seed=8")
    assert "the recipe is not the one this run began with" in said
    assert "run.seed: was 7, now 8" in said


# Evaluation and sampling


@pytest.mark.parametrize("verb", ["evaluate", "sample"])
def test_checkpoints_that_are_none(mistake: Mistake, recipe: Path, trained: Path, verb: str) -> None:
    assert "has no checkpoint yet; train first, or give --checkpoint" in mistake(verb, recipe)
    assert "is not a checkpoint" in mistake(verb, trained, "--checkpoint", "/nowhere")
    assert "is not a checkpoint" in mistake(verb, trained, "--checkpoint", trained.parent / "runs")
    assert "was trained with model.hidden_size=32" in mistake(verb, trained, "model.hidden_size=64")


def test_a_pointer_to_nothing(mistake: Mistake, copied: Path, tmp_path: Path) -> None:
    latest = tmp_path / "runs/trained/checkpoints/latest"
    output = f"run.output_dir={tmp_path / 'runs'}"
    latest.write_text("step_00000077\n")
    assert "step_00000077" in mistake("sample", copied, output)


def test_evaluation_without_a_set(mistake: Mistake, trained: Path) -> None:
    assert "data.valid_prefix is null" in mistake("evaluate", trained, "data.valid_prefix=null")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "to be or not to be " * 20], "tokens and data.seq_length is 32; shorten them"),
        (["data.tokenizer=nowhere.model"], "nowhere.model: no such file"),
        (["data.tokenizer=README.md"], "must end in one of '.model', '.json'"),
    ],
)
def test_samples_that_cannot_be(mistake: Mistake, trained: Path, arguments: list[str], message: str) -> None:
    assert message in mistake("sample", trained, *arguments)


def test_evaluate_and_sample(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained)]) == 0
    assert "nats per token" in capfd.readouterr().out
    assert main(["sample", str(trained), "--steps", "2", "--num-samples", "2"]) == 0
    assert capfd.readouterr().out.count("--- sample") == 2


def test_samples_are_scored(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tool on what `sample` wrote: held-out text beside it, and all that made it in the scores."""
    folder = trained.parent / "runs/trained/samples"
    assert main(["sample", str(trained), "--steps", "2", "--num-samples", "3", "--seed", "5"]) == 0
    (path,) = folder.glob("*-seed5.json")
    for _ in range(2):  # scores among the samples are passed over
        monkeypatch.setattr(sys, "argv", ["score_samples.py", *map(str, folder.glob("*-seed5*.json"))])
        assert score_samples.main() == 0
    assert capfd.readouterr().out.count("reference") == 2
    record = json.loads(path.with_suffix(".scores.json").read_text())
    assert (record["made_by"]["seed"], record["made_by"]["sampling"]["num_steps"]) == (5, 2)
    assert len(record["made_by"]["checkpoint_hash"]) == 32
    assert record["samples"]["num_samples"] == record["reference"]["num_samples"] == 3
    assert record["samples"]["network_calls"] <= 3
    monkeypatch.setattr(sys, "argv", ["score_samples.py", str(trained)])
    assert score_samples.main() == 2
    assert "is no file of samples" in capfd.readouterr().err


def test_evaluate_local_files(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Texts and questions in place of the held-out set, which may then be missing."""
    texts, questions = tmp_path / "play.v1.jsonl", tmp_path / "quiz.jsonl"
    texts.write_text('{"text": "to be , or not"}\n{"text": "to be ."}\n' * 3)
    questions.write_text('{"prompt": "to be, or not", "choices": [" to be", " king"], "answer": 0}\n')
    files = ["--text", f"lm1b={texts}", "--choices", str(questions), "--draws", "4"]
    assert main(["evaluate", str(trained), *files, "data.valid_prefix=null"]) == 0
    assert "of 1 questions" in capfd.readouterr().out
    folder = trained.parent / "runs/trained/evaluations"
    record = json.loads((folder / "step_00000002-ema-play.json").read_text())
    assert (record["rules"], record["text"]) == ("lm1b", str(texts))
    answers = json.loads((folder / "step_00000002-ema-quiz.json").read_text())
    assert answers["num_draws"] == 4
    assert len(answers["checkpoint_hash"]) == 32
    assert (folder / "step_00000002-ema-play-by_time.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flag", "name", "line", "message"),
    [
        ("--text", "plain=bad.jsonl", '{"txt": "a"}', "bad.jsonl:1: no key 'text'; mend the line"),
        ("--text", "plain=none.jsonl", None, "none.jsonl: no such file"),
        ("--choices", "bad.jsonl", '{"prompt": "a"}', "bad.jsonl:1: a line must be"),
        ("--choices", "none.jsonl", None, "none.jsonl: No such file or directory"),
    ],
)
def test_files_that_cannot_be_evaluated(
    mistake: Mistake, trained: Path, tmp_path: Path, flag: str, name: str, line: str | None, message: str
) -> None:
    rules, equals, file = name.rpartition("=")
    if line is not None:
        (tmp_path / file).write_text(line + "\n")
    assert message in mistake("evaluate", trained, flag, f"{rules}{equals}{tmp_path / file}")


def test_a_record_that_cannot_be_written_is_not_said_to_be(
    copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs/trained/evaluations"
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("in the way")
    assert main(["evaluate", str(copied), f"run.output_dir={tmp_path / 'runs'}"]) == 2
    said = capfd.readouterr()
    assert "held-out NELBO" in said.out
    assert "written to" not in said.out
    assert said.err.startswith(f"error: {folder}: ")


def test_two_files_of_one_record_are_refused_before_a_model_is_loaded(
    mistake: Mistake, trained: Path
) -> None:
    files = ["--text", "plain=one/test.jsonl", "--text", "plain=two/test.jsonl"]
    said = mistake("evaluate", trained, *files, "--checkpoint", "/nowhere")
    assert said == "one/test.jsonl and two/test.jsonl would both be the record 'test'; rename one of them"


def test_samples_are_kept_with_what_made_them(
    copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sampler = ["--sampler", "saber", "sampling.variant=paper", "--suffix", "to be", "--trace", "2"]
    runs = tmp_path / "runs"
    assert main(["sample", str(copied), f"run.output_dir={runs}", *sampler, "--num-samples", "2"]) == 0
    said = capfd.readouterr().out
    (kept,) = runs.glob("*/samples/*saber*.json")
    assert str(kept) in said
    assert kept.with_suffix(".png").stat().st_size > 1000
    assert "saber" in kept.with_suffix(".html").read_text()
    record = json.loads(kept.read_text())
    assert record["sampling"] == {
        "kind": "saber",
        "variant": "paper",
        "min_tokens": 2,
        "backtrack_every": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "guidance_scale": 0.0,
        "block_size": None,
    }
    assert (record["seed"], record["suffix"]) == (1, "to be")
    assert len(record["checkpoint_hash"]) == 32
    first, second = record["samples"]
    assert first["text"].endswith("to be")
    assert first["text"] in said
    free = sum(step > 0 for step in first["last_change"])
    assert first["parallelism"] == pytest.approx(free / first["steps"])
    assert record["mean"]["steps"] == (first["steps"] + second["steps"]) / 2
    assert -1 <= first["kendall_tau"] <= 1
