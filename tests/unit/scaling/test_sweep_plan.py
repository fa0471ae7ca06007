"""A sweep's file to the recipes of its runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.unit.scaling.sweep_file import write_sweep
from xdlm_megatron.__main__ import main
from xdlm_megatron.config.derive import flops_per_token
from xdlm_megatron.config.load import ConfigError, dump_recipe, load_recipe
from xdlm_megatron.scaling.collect import collect_table
from xdlm_megatron.scaling.ladder import LADDER
from xdlm_megatron.scaling.sweep import load_sweep

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_every_combination_is_a_whole_recipe(tmp_path: Path) -> None:
    plan = load_sweep(write_sweep(tmp_path), ["optimizer.lr=0.5"])
    assert len(plan.points) == 8
    point = next(p for p in plan.points if p.name == "large-D3.277e04-uniform_ratio0.5")
    config = point.config
    assert (config.model.hidden_size, config.diffusion.uniform_ratio) == (32, 0.5)
    assert config.train.num_steps == 32768 // (8 * 32)
    assert (config.lr_schedule.warmup_steps, config.lr_schedule.decay_steps) == (3, 26)
    assert config.optimizer.lr == 0.5
    assert (config.run.output_dir, config.run.name) == (str(tmp_path / "sweep"), point.name)
    assert config.tracking.parent_run == "sweep"
    (tmp_path / "recipe.yaml").write_text(dump_recipe(config))
    assert load_recipe(tmp_path / "recipe.yaml") == config


def test_seeds_are_an_axis(tmp_path: Path) -> None:
    plan = load_sweep(write_sweep(tmp_path, axes={"run.seed": [1, 2, 3]}))
    assert {point.config.run.seed for point in plan.points} == {1, 2, 3}
    assert len(plan.points) == 2 * 2 * 3


def test_an_axis_of_cases_sets_several_fields(tmp_path: Path) -> None:
    twin = {
        "diffusion.uniform_ratio": 0,
        "model.autoregressive": True,
        "sampling.kind": "left_to_right",
    }
    cases = {"udlm": {"diffusion.uniform_ratio": 1}, "a twin": twin}
    plan = load_sweep(write_sweep(tmp_path, axes={"run.seed": [1, 2], "noise": cases}))
    assert len(plan.points) == 2 * 2 * 2 * 2
    by_name = {point.name: point.config for point in plan.points}
    config = by_name["small-D8192-seed2-a_twin"]
    assert (config.run.seed, config.diffusion.uniform_ratio) == (2, 0)
    assert config.model.autoregressive
    assert by_name["small-D8192-seed1-udlm"].diffusion.uniform_ratio == 1
    twice = {"run.seed": [1], "noise": {"udlm": {"run.seed": 2}}}
    with pytest.raises(ConfigError, match=r"two axes set run\.seed"):
        load_sweep(write_sweep(tmp_path, axes=twice))
    bad = {"noise": {"udlm": {"diffusion.uniform_ratio.k": 1}}}
    with pytest.raises(ConfigError, match=r"sweep.axes.noise.udlm: 'uniform_ratio' is a value"):
        load_sweep(write_sweep(tmp_path, axes=bad), ["diffusion.uniform_ratio=0"])


def test_designs(tmp_path: Path) -> None:
    def points(**design: object) -> list:
        return load_sweep(write_sweep(tmp_path, design=design, axes={})).points

    for point in points(kind="iso_flops", flops=[1e10, 1e11]):
        spent = flops_per_token(point.config) * point.figures.total_tokens
        assert spent == pytest.approx(float(point.budget[1:]), rel=0.02)
    for point in points(kind="tokens_per_parameter", ratios=[20]):
        assert point.figures.total_tokens == pytest.approx(20 * point.figures.num_parameters, rel=0.02)


def test_rules_set_batch_and_learning_rate(tmp_path: Path) -> None:
    design = {"kind": "tokens", "numbers": [1e9]}
    plan = load_sweep(write_sweep(tmp_path, design=design, axes={}, batch="step_law", lr="step_law"))
    for point in plan.points:
        n, batch = point.figures.num_non_embedding_parameters, 0.58 * 1e9**0.571 / 32
        assert 2**-0.5 <= point.config.train.global_batch_size / batch <= 2**0.5
        assert point.config.train.global_batch_size % 4 == 0
        assert point.config.optimizer.lr == pytest.approx(1.79 * n**-0.713 * 1e9**0.307, rel=0.01)


def test_limits_leave_runs_out_and_say_so(tmp_path: Path) -> None:
    plan = load_sweep(write_sweep(tmp_path, steps=[100, 200]))
    assert [point.config.train.num_steps for point in plan.points] == [128] * 4
    assert "small-D8192-uniform_ratio0: 32 steps" in plan.left_out
    plan = load_sweep(write_sweep(tmp_path, tokens_per_parameter=[0, 1]))
    assert all(p.figures.total_tokens <= p.figures.num_parameters for p in plan.points)
    assert "small-D3.277e04-uniform_ratio0: 2." in " ".join(plan.left_out)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sizes": ["3m"]}, "sweep.sizes=['3m']: the ladder has 10m, 25m"),
        ({"design": {"kind": "iso"}}, "design.kind: Input should be 'iso_flops', 'tokens_per_parameter' or"),
        ({"design": {"kind": "tokens", "number": [1]}}, "design.number: no such field; did you mean"),
        ({"axis": {}}, "axis: no such field; did you mean 'axes'?"),
        ({"axes": {"diffusion.uniform_rati": [1]}}, "no such field; did you mean 'uniform_ratio'?"),
        ({"axes": {"run.seed": []}}, "axes.run.seed: must be a list of values, or cases"),
        ({"batch": "chinchilla"}, "batch: Input should be 'fixed', 'gidd', 'deepseek' or 'step_law'"),
        ({"steps": [1, 2]}, "sweep.steps and sweep.tokens_per_parameter leave no run (small-D8192"),
        ({"design": {"kind": "tokens", "numbers": [8192, 8192.1]}}, "look alike; write them apart"),
        ({"gpu": "h1000"}, "h1000: no such GPU type here"),
        ({"gpu": "h100", "gpus": 7}, "no layout fits 7 x h100 at a batch of 8 sequences"),
    ],
)
def test_mistakes_are_told_in_a_line(
    tmp_path: Path, section: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write_sweep(tmp_path, **section)), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


def test_the_ladder_from_10m_to_8b() -> None:
    plan = load_sweep(EXAMPLES / "ladder.yaml", ["sweep.gpu=null", "sweep.gpus=null"])
    assert {point.size for point in plan.points} == set(LADDER)
    by_budget = Counter((p.budget, p.config.diffusion.uniform_ratio) for p in plan.points)
    assert len(by_budget) == 6 * 3
    assert min(by_budget.values()) >= 5, "a valley needs four sizes"
    assert all(point.flops == pytest.approx(float(point.budget[1:]), rel=0.01) for point in plan.points)


def test_the_laptops_ladder_gives_valleys() -> None:
    """Four sizes or more that all have the four budgets, for each of three noises."""
    plan = load_sweep(EXAMPLES / "ladder_laptop.yaml")
    budgets = Counter((point.size, point.config.diffusion.uniform_ratio) for point in plan.points)
    complete = Counter(ratio for (_, ratio), count in budgets.items() if count == 4)
    assert set(complete) == {0, 0.1, 1}
    assert min(complete.values()) >= 4


def test_the_committed_results_are_of_the_laptops_ladder() -> None:
    plan = {point.name: point for point in load_sweep(EXAMPLES / "ladder_laptop.yaml").points}
    committed = collect_table(EXAMPLES.parent / "benchmarks/results/ladder/points.csv")
    assert not committed.skipped
    for row in committed.points:
        point = plan[row.run]
        assert (row.params, row.tokens) == (point.figures.num_parameters, point.figures.total_tokens)
        assert row.flops == pytest.approx(point.flops, rel=1e-5)
        assert row.uniform_ratio == point.config.diffusion.uniform_ratio


def test_a_recipe_is_no_sweep() -> None:
    with pytest.raises(ConfigError, match=r"has no section `sweep`; see examples/ladder\.yaml"):
        load_sweep(EXAMPLES / "quickstart.yaml")


def test_the_dry_run_prices_runs_on_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, gpu="h100", gpus={"small": 1, "large": 2}, price=1000)
    assert main(["sweep", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, rows = lines[1].split(), [line.split() for line in lines[2:10]]
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert {(row["run"].split("-")[0], row["GPUs"]) for row in cells} == {("small", "1"), ("large", "2")}
    points = load_sweep(path).points
    for row, point in zip(cells, points, strict=True):
        assert row["run"] == point.name
        assert row["steps"] == str(point.config.train.num_steps)
        assert float(row["cost"]) == pytest.approx(1000 * point.gpu_hours, abs=0.5)
        assert float(row["hours"]) == pytest.approx(point.seconds / 3600, rel=0.01)
    assert lines[10].split()[0:2] == ["8", "runs"]
    assert not (tmp_path / "sweep").exists(), "a dry run writes nothing"
