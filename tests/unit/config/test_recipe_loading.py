"""From a file and overrides to a RunConfig, and what each mistake says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from xdlm_megatron.config.load import ConfigError, build_config, dump_recipe, load_recipe, to_tree
from xdlm_megatron.config.schema import CosineLr, WsdLr

Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def path(tmp_path: Path, recipe: dict[str, Any]) -> Path:
    return write(tmp_path, yaml.safe_dump(recipe))


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_three_mistakes_are_told_at_once_and_in_full(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["diffusion"] = {"schedule": "loglinaer", "unifrom_ratio": 0.1}
    recipe["parallel"] = {"tensor_model_parallel_size": "two"}
    assert complaint(write(tmp_path, yaml.safe_dump(recipe))) == (
        "run.yaml: 3 bad fields\n"
        "  diffusion.schedule: Input should be 'loglinear', 'cosine' or 'snr' (got 'loglinaer')\n"
        "  diffusion.unifrom_ratio: no such field; did you mean 'uniform_ratio'?\n"
        "  parallel.tensor_model_parallel_size: Input should be a valid integer (got 'two')"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1e3),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("2", 2.0),
        ("1_000.5", 1000.5),
    ],
)
def test_floats_as_people_write_them(path: Path, text: str, value: float) -> None:
    in_file = write(path.parent, path.read_text().replace("lr: 0.001", f"lr: {text}"))
    for config in (load_recipe(in_file), load_recipe(path, [f"optimizer.lr={text}"])):
        assert config.optimizer.lr == value
        assert isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers='4'", "model.num_layers: Input should be a valid integer (got '4')"),
        ("model.num_layers=4.0", "model.num_layers: Input should be a valid integer (got 4.0)"),
        ("model.num_layers=4.5", "model.num_layers: Input should be a valid integer (got 4.5)"),
        ("model.num_layers=true", "model.num_layers: Input should be a valid integer (got True)"),
        ("model.num_layers=null", "model.num_layers: Input should be a valid integer (got None)"),
        ("model.num_layers=[4]", "model.num_layers: Input should be a valid integer (got [4])"),
        ("model.num_layers=0", "model.num_layers: Input should be greater than or equal to 1 (got 0)"),
        ("optimizer.lr='3e-4'", "optimizer.lr: Input should be a valid number (got '3e-4')"),
        ("optimizer.lr=true", "optimizer.lr: Input should be a valid number (got True)"),
        ("optimizer.lr=.nan", "optimizer.lr: Input should be a finite number (got nan)"),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number (got inf)"),
        ("model.qk_layernorm=1", "model.qk_layernorm: Input should be a valid boolean (got 1)"),
        ("model.qk_layernorm='yes'", "model.qk_layernorm: Input should be a valid boolean (got 'yes')"),
        ("run.name=3", "run.name: Input should be a valid string (got 3)"),
        ("run.output_dir=null", "run.output_dir: Input should be a valid string (got None)"),
        ("model.mcore=3", "model.mcore: Input should be a valid dictionary (got 3)"),
        ("parallel=3", "parallel: must be a section of fields (got 3)"),
        ("model=null", "model: must be a section of fields (got None)"),
        ("lr_schedule=null", "lr_schedule: must be a section of fields (got None)"),
        ("lr_schedule={}", "lr_schedule.kind: required; choose 'constant', 'cosine' or 'wsd'"),
        (
            "lr_schedule.kind=linear",
            "lr_schedule.kind: Input should be 'constant', 'cosine' or 'wsd' (got 'linear')",
        ),
        ("lr_schedule.kind=wsd", "lr_schedule.decay_steps: required, and has no default; add it"),
        (
            "lr_schedule.warm_up_steps=3",
            "lr_schedule.warm_up_steps: no such field; did you mean 'warmup_steps'?",
        ),
        (  # no hint at fields of another kind
            "lr_schedule.decay_steps=3",
            "lr_schedule.decay_steps: no such field; remove it (there are kind, warmup_steps, min_lr)",
        ),
        (
            "lr_schedule.warmup_steps=-1",
            "lr_schedule.warmup_steps: Input should be greater than or equal to 0 (got -1)",
        ),
        ("mode.num_layers=3", "mode: no such field; did you mean 'model'?"),
        ("model.n_layers=3", "model.n_layers: no such field; did you mean 'num_layers'?"),
    ],
)
def test_a_bad_value_is_told_in_one_line(path: Path, override: str, message: str) -> None:
    assert complaint(path, override) == f"run.yaml: 1 bad field\n  {message}"


def test_a_missing_section_and_a_missing_field(tmp_path: Path, recipe: dict[str, Any]) -> None:
    del recipe["model"], recipe["data"]["seq_length"]
    assert complaint(write(tmp_path, yaml.safe_dump(recipe))) == (
        "run.yaml: 2 bad fields\n"
        "  model: required, and has no default; add it\n"
        "  data.seq_length: required, and has no default; add it"
    )


def test_contradictions_are_told_at_once_too(path: Path) -> None:
    text = complaint(path, "data.mask_id=100", "model.num_query_groups=3")
    assert text.startswith("run.yaml: 2 bad fields\n")
    assert "data.mask_id=100 must be below data.vocab_size=100" in text
    assert "model.num_query_groups=3" in text


def test_whole_numbers_do_for_floats_and_null_where_it_is_allowed(changed: Change) -> None:
    config = build_config(
        changed({"optimizer.weight_decay": 1, "model.kv_channels": None, "tracking.mlflow": None})
    )
    assert config.optimizer.weight_decay == 1.0
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.model.kv_channels is None
    assert config.tracking.mlflow is None


def test_overrides_reach_nested_absent_and_union_sections(path: Path) -> None:
    config = load_recipe(
        path,
        [
            "train.num_steps=30",
            "train.num_steps=40",  # the last one counts
            "parallel.sequence_parallel=true",
            "parallel.tensor_model_parallel_size=2",
            "model.mcore.recompute_granularity=full",
            "run.name=a-b",
            "lr_schedule.min_lr=1e-5",
        ],
    )
    assert config.train.num_steps == 40
    assert config.parallel.sequence_parallel is True
    assert config.model.mcore == {"recompute_granularity": "full"}
    assert config.lr_schedule == CosineLr(kind="cosine", min_lr=1e-5)


def test_an_override_replaces_a_section(path: Path) -> None:
    config = load_recipe(path, ["lr_schedule={kind: wsd, decay_steps: 5}"])
    assert config.lr_schedule == WsdLr(kind="wsd", decay_steps=5)


def test_an_override_may_hold_an_equals_sign(path: Path) -> None:
    assert load_recipe(path, ["run.output_dir=a=b"]).run.output_dir == "a=b"


@pytest.mark.parametrize("override", ["train.num_steps", "=3", "train..num_steps=3", ".=3", "--resume"])
def test_an_override_without_its_form(path: Path, override: str) -> None:
    assert complaint(path, override) == (
        f"override '{override}': write it as section.field=value, for example train.num_steps=100"
    )


def test_overrides_that_make_no_sense(path: Path) -> None:
    assert "'num_steps' is a value, not a section" in complaint(path, "train.num_steps.more=3")
    assert "'[1' is not YAML" in complaint(path, "train.num_steps=[1")
    assert "'2024-13-01' is not YAML: month must be" in complaint(path, "run.name=2024-13-01")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: a}\nrun: {name: b}\n", "'run' is given twice (line 2); keep one"),
        ("run:\n  name: a\n  seed: 1\n  name: b\n", "'name' is given twice (line 4); keep one"),
        ("1: {name: a}", "'1' cannot be a key (line 1)"),
        ("on: {name: a}", "'on' cannot be a key (line 1)"),
        ("{[1]: 3}", "a list or a mapping cannot be a key (line 1)"),
        ("a: &x {b: 1}\nc: {<<: *x}", "'<<' cannot be a key (line 2)"),
        ("run: {name: [a}", "not a recipe in YAML"),
        ("run: !!python/object:os.system {}", "not a recipe in YAML"),
        ("run: 2024-13-45", "not a recipe in YAML: month must be in 1..12"),
        ("", "a recipe is a mapping of sections (got None); see examples/"),
        ("- run", "a recipe is a mapping of sections (got ['run']); see examples/"),
        ("word", "a recipe is a mapping of sections (got 'word'); see examples/"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    said = complaint(path)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert "\n" not in said


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert complaint(missing) == (
        f"{missing}: cannot read the recipe (No such file or directory); give the path of a YAML file"
    )
    assert "Is a directory" in complaint(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run: {name: é}".encode("latin-1"))
    assert "not a recipe in YAML: 'utf-8' codec" in complaint(tmp_path / "latin.yaml")


def reloaded(tree: dict[str, Any], folder: Path) -> None:
    config = build_config(tree)
    again = load_recipe(write(folder, dump_recipe(config)))
    assert again == config
    assert to_tree(again) == to_tree(config)


def test_the_dump_of_random_numbers_loads_equal(tmp_path: Path, changed: Change) -> None:
    draw = random.Random(0)
    for _ in range(50):
        numbers = {
            "optimizer.lr": 10 ** draw.uniform(-12, 12),
            "optimizer.adam_eps": 10 ** draw.uniform(-300, 0),
            "optimizer.ema_decay": draw.random(),
            "diffusion.alpha_min": 10 ** draw.uniform(-8, -1),
            "run.seed": draw.randrange(2**32),
            "lr_schedule": {"kind": "wsd", "decay_steps": draw.randint(1, 20)},
        }
        reloaded(changed(numbers), tmp_path)


@pytest.mark.parametrize(
    "name",
    ["12e3", "1e5", "1.5", "7", "1_0", "0x1F", "true", "No", "null", "2024-01-01", "1.e-3", "12e-4", "a"],
)
def test_the_dump_of_a_name_that_looks_like_something_else_loads_equal(
    tmp_path: Path, changed: Change, name: str
) -> None:
    reloaded(
        changed({"run.name": name, "data.tokenizer": name, "model.mcore": {"a": name, "b": [name]}}), tmp_path
    )


@pytest.mark.parametrize(
    "text",
    ["", "~", "a: b", "# no comment", "é ü", "two\nlines", " blank ", "-", "[", "%", "x" * 200, "a'b\"c"],
)
def test_the_dump_of_awkward_text_loads_equal(tmp_path: Path, changed: Change, text: str) -> None:
    reloaded(changed({"tracking.experiment": text, "data.train_prefix": text}), tmp_path)


def test_the_dump_says_every_default(recipe: dict[str, Any]) -> None:
    dumped = yaml.safe_load(dump_recipe(build_config(recipe)))
    assert dumped["tracking"] == {"mlflow": "local", "experiment": "xdlm", "parent_run": None}
    assert dumped["precision"] == {
        "dtype": "float32",
        "fp8": None,
        "fp8_recipe": "tensorwise",
        "fp8_param_gather": False,
        "num_layers_at_start_in_bf16": 0,
        "num_layers_at_end_in_bf16": 0,
    }
    assert dumped["model"]["num_query_groups"] is None
