"""The command line: what a user's mistake costs is one message and exit status 2, never a traceback."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import score_samples
from xdlm_megatron.__main__ import main
from xdlm_megatron.config.derive import num_parameters
from xdlm_megatron.config.load import load_recipe

SMALL = """
run: {name: small}
model: {num_layers: 2, hidden_size: 8, ffn_hidden_size: 16, num_attention_heads: 2}
parallel: {tensor_model_parallel_size: 2}
data: {train_prefix: data/a, tokenizer: data/a.model, seq_length: 8, vocab_size: 100, mask_id: 2}
optimizer: {lr: 1e-3}
lr_schedule: {kind: constant}
train: {num_steps: 4, micro_batch_size: 2, global_batch_size: 8}
"""
Mistake = Callable[..., str]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's environment; and torch.distributed's excepthook does not outlive a test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe for two processes whose data is not there."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def mistake(capfd: pytest.CaptureFixture[str]) -> Mistake:
    """Runs the command line; checks the form of the failure and returns the message."""

    def run(*arguments: str | Path) -> str:
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse's way
            status = stop.code
        said = capfd.readouterr().err
        assert status == 2, said
        assert said.count("error: ") == 1, said
        assert "Traceback" not in said
        assert "Warning" not in said
        return said.partition("error: ")[2].strip()

    return run


@pytest.fixture
def recipe(tmp_path: Path, tiny_recipe: dict[str, dict]) -> Path:
    """A recipe file whose run folder is in tmp_path."""
    return write(tmp_path, tiny_recipe, "tiny")


def write(folder: Path, tiny_recipe: dict[str, dict], name: str) -> Path:
    tree = copy.deepcopy(tiny_recipe)
    tree["run"] |= {"name": name, "output_dir": str(folder / "runs")}
    tree["train"] |= {"num_steps": 4, "global_batch_size": 2}
    tree["model"] |= {"num_layers": 1}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: dict[str, dict]) -> Iterator[Path]:
    """The recipe of a run that trained for two steps."""
    folder = tmp_path_factory.mktemp("cli")
    path = write(folder, tiny_recipe, "trained")
    assert main(["train", str(path), "train.stop_after_step=2"]) == 0
    yield path
    shutil.rmtree(folder)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to be damaged; its recipe."""
    shutil.copytree(trained.parent / "runs", tmp_path / "runs")
    return trained


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
