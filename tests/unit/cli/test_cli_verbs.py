"""The command line: what a user's mistake costs is one message and exit status 2, never a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from xdlm_megatron.__main__ import main
from xdlm_megatron.config.derive import num_parameters
from xdlm_megatron.config.load import load_recipe

Mistake = Callable[..., str]


# Verbs and options


def test_verbs(mistake: Mistake, small: Path) -> None:
    assert "VERB" in mistake()
    assert "invalid choice: 'tarin'" in mistake("tarin", small)
    assert mistake("train").endswith("required: recipe")


def test_a_full_disk_while_a_file_is_written_is_a_line(
    mistake: Mistake, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dump_recipe(config: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")  # as write() has it: without a file's name

    monkeypatch.setattr("xdlm_megatron.__main__.dump_recipe", dump_recipe)
    assert mistake("show-config", small).startswith(
        "No space left on device: a file could not be written whole; "
    )


@pytest.mark.parametrize(
    ("verb", "said"), [("train", "interrupted before it could save"), ("plan", "interrupted")]
)
def test_an_interrupt_is_a_line(
    verb: str, said: str, mistake: Mistake, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_recipe(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xdlm_megatron.__main__.load_recipe", load_recipe)
    assert mistake(verb, small) == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["show-config", "--world-size", "0"],
            "--world-size: must be a whole number of at least 1 (got '0')",
        ),
        (
            ["show-config", "--world-size", "-2"],
            "--world-size: must be a whole number of at least 1",
        ),
        (["show-config", "--resume"], "unrecognized arguments: --resume"),
        (["sample", "--steps", "0"], "--steps: must be a whole number of at least 1 (got '0')"),
        (["sample", "--steps", "ten"], "--steps: must be a whole number of at least 1 (got 'ten')"),
        (["sample", "--num-samples", "-1"], "--num-samples: must be a whole number of at least 1"),
        (["sample", "--top-p", "2"], "--top-p: must be in (0, 1]; 1 keeps every token (got '2')"),
        (["sample", "--top-p", "nan"], "--top-p: must be in (0, 1]"),
        (["sample", "--temperature", "-1"], "--temperature: must be at least 0"),
        (["sample", "--temperature", "inf"], "--temperature: must be at least 0"),
        (["sample", "--temperature", "0"], "sampling.temperature: Input should be greater than 0"),
        (["sample", "--sampler", "best"], "sampling.kind: Input should be 'ancestral', "),
        (["sample", "--sampler", "confidence", "--final", "none"], "sampling.final: no such field"),
        (["sample", "--seed", "-1"], "--seed: must be a whole number in [0, 2^32)"),
        (["sample", "--trace", "1"], "--trace: must be 0, or at least 2"),
        (["sample", "--final", "best"], "--final: invalid choice: 'best'"),
        (["train", "--steps", "3"], "unrecognized arguments: --steps"),
        (["evaluate", "--discrete-steps", "0"], "--discrete-steps: must be a whole number of at least 1"),
        (["evaluate", "--text", "wiki=a.jsonl"], "RULES=FILE with RULES one of plain, wikitext, ptb"),
        (["evaluate", "--text", "a.jsonl"], "must be RULES=FILE"),
        (["evaluate", "--draws", "8"], "--draws 8 has no effect without --choices"),
    ],
)
def test_options(mistake: Mistake, arguments: list[str], message: str, small: Path) -> None:
    verb, *options = arguments
    assert message in mistake(verb, small, *options)


# Recipes


@pytest.mark.parametrize("verb", ["show-config", "train", "evaluate", "sample"])
def test_every_verb_refuses_a_bad_recipe(mistake: Mistake, tmp_path: Path, small: Path, verb: str) -> None:
    assert "cannot read the recipe" in mistake(verb, tmp_path / "none.yaml")
    assert mistake(verb, small, "model.num_layer=3") == (
        "small.yaml: 1 bad field\n  model.num_layer: no such field; did you mean 'num_layers'?"
    )
    assert mistake(verb, small, "train.num_steps").startswith("override 'train.num_steps': write it as")


@pytest.mark.parametrize("verb", ["train", "evaluate", "sample"])
def test_a_layout_that_does_not_fit(
    mistake: Mistake, monkeypatch: pytest.MonkeyPatch, small: Path, verb: str
) -> None:
    assert mistake(verb, small).startswith("world size 1 must be a multiple of")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert mistake(verb, small).startswith("world size 3 must be a multiple of")


def test_a_batch_that_does_not_fit(mistake: Mistake, small: Path) -> None:
    said = mistake("show-config", small, "--world-size", "16", "train.global_batch_size=24")
    assert said.startswith("train.global_batch_size=24 must be a multiple of")
    assert said.endswith("nearest: 16 or 32")


def test_show_config(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", str(small), "train.log_interval=3", "--world-size", "4", "run.seed=9"]) == 0
    shown = capfd.readouterr().out
    tree = yaml.safe_load(shown)
    assert tree["train"]["log_interval"] == 3
    assert tree["run"]["seed"] == 9  # overrides may follow options
    assert tree["optimizer"]["adam_beta1"] == 0.9
    assert "# data_parallel_size: 2\n" in shown
    assert f"# num_parameters: {num_parameters(load_recipe(small)):,}\n" in shown


def test_show_config_reads_its_own_output(
    small: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["show-config", str(small)])
    shown = capfd.readouterr().out
    (tmp_path / "again.yaml").write_text(shown)
    assert main(["show-config", str(tmp_path / "again.yaml")]) == 0
    assert capfd.readouterr().out == shown


def test_one_message_a_machine(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for local_rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", "8")
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(["train", "none.yaml"]) == 2
        assert capfd.readouterr().err.count("error: ") == lines


# What is not the user's mistake


def test_an_error_of_another_library_keeps_its_traceback(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xdlm_megatron.__main__.derive", lambda *_: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        main(["show-config", str(small)])


# Processes of their own


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


HEAVY = ("torch", "megatron", "mlflow", "matplotlib", "numpy")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["show-config"],
        ["train", "model.num_layers=two"],
        ["train"],  # without its two processes
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(small: Path, arguments: list[str]) -> None:
    run = f"main({[arguments[0], str(small), *arguments[1:]]})" if arguments else ""
    done = python(
        "-c",
        f"import sys\nfrom xdlm_megatron.__main__ import main\n{run}\n"
        f"print('heavy:', [m for m in {HEAVY} if m in sys.modules])",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_module_runs_and_ends_with_the_status() -> None:
    done = python("-m", "xdlm_megatron", "show-config", "none.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: none.yaml: cannot read the recipe (No such file or directory); give the path of a YAML file\n"
    )
    assert python("-m", "xdlm_megatron", "--version").stdout.strip() == "0.1.0"


def test_a_reader_that_leaves_early_is_no_error(small: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "xdlm_megatron", "show-config", str(small)],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        text=True,
        timeout=120,
    )
    os.close(writer)
    assert done.stderr == ""


def test_training_that_cannot_start_prints_its_message_alone(recipe: Path) -> None:
    done = python("-m", "xdlm_megatron", "train", str(recipe), "data.train_prefix=nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere.json: no such manifest")
    assert done.stderr.count("\n") == 1


def test_options_of_convert_that_have_no_effect(small: Path, mistake: Mistake) -> None:
    assert "one of the arguments --from-hf --to-hf is required" in mistake("convert", small)
    for way, idle in (
        ("--from-hf", ["--no-ema"]),
        ("--from-hf", ["--names", "llama"]),
        ("--from-hf", ["--checkpoint", "x"]),
        ("--to-hf", ["--write-recipe"]),
    ):
        said = mistake("convert", small, way, "folder", *idle)
        assert f"{idle[0]} has no effect with {way}; leave it out" in said
    assert "folder: no such folder; download the model" in mistake(
        "convert", small, "--from-hf", "folder", "train.init_from=x"
    )
