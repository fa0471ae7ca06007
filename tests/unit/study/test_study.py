"""A small study from its file to its page: what is measured stays, a wider protocol measures the rest."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.evaluation.tiny_scorer import write_scorer
from xdlm_megatron.__main__ import main
from xdlm_megatron.study.collect import (
    BoundRow,
    Results,
    SampleRow,
    over_seeds,
)
from xdlm_megatron.study.tables import differences, dynamics, generation, likelihood

SIZE = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
TWIN = {
    "diffusion.uniform_ratio": 0,
    "model.autoregressive": True,
    "sampling.kind": "left_to_right",
}


@pytest.fixture(scope="module")
def sweep(tiny_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser and its twin, two checkpoints each."""
    folder = tmp_path_factory.mktemp("study")
    tree = {
        "run": {"name": "small", "output_dir": str(folder / "runs")},
        "sweep": {
            "sizes": {"w16": SIZE},
            "design": {"kind": "tokens", "numbers": [4 * 4 * 32]},
            "axes": {"noise": {"xdlm": {"diffusion.uniform_ratio": 0.2}, "twin": TWIN}},
            "batch": "fixed",
            "lr": "fixed",
            "gpu": None,
        },
        "data": tiny_data,
        "optimizer": {"lr": 1e-2, "ema_decay": 0.5},
        "lr_schedule": {"kind": "constant"},
        "train": {"micro_batch_size": 4, "global_batch_size": 4},
        "checkpoint": {"save_interval": 2, "keep_every": 2},
        "evaluation": {"interval": 100, "num_sequences": 8},
        "tracking": {"mlflow": None},
    }
    write_scorer(folder / "scorer")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def page(sweep: Path) -> Path:
    """The folder of the study's first page."""
    return study(sweep, sweep.parent / "page", "--steps", "1", "2")


def study(sweep: Path, output: Path, *options: str) -> Path:
    judge = ("--scorer", str(sweep.parent / "scorer"), "--scorer-dtype", "bfloat16")
    protocol = ("--dynamics-steps", "2", "--num-samples", "3", "--batch-size", "4", *judge)
    command = ["study", str(sweep), "--output", str(output), "--local", "1", *protocol, *options]
    assert main(command) == 0
    return output


def stamps(sweep: Path) -> dict[Path, int]:
    runs = sweep.parent / "runs/small"
    return {path: path.stat().st_mtime_ns for path in runs.glob("*/*/step_*.json")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"sweep.sizes.wide={SIZE}"], "a study compares models of one size and one budget"),
        (["sweep.axes={optimizer.lr: [0.1, 0.2]}"], "2 runs are XDLM k=0.1 of seed 1"),
        ([f"sweep.axes={{noise: {{twin: {TWIN}}}}}"], "no model of the study is a denoiser"),
        (["optimizer.ema_decay=0"], "a study measures averaged weights"),
        (["data.valid_prefix=null"], "a study needs held-out text"),
        (["--scorer", "nowhere"], "--scorer nowhere: no such folder or file"),
    ],
)
def test_mistakes_are_told_before_anything_trains(
    arguments: list[str], message: str, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(sweep), f"run.output_dir={tmp_path}/runs", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_from_a_sweep_to_a_page(page: Path) -> None:
    text = (page / "README.md").read_text()
    for title in ("Likelihood", "Samples", "Reconstruction", "Over training"):
        assert f"## {title}" in text
    assert "XDLM k=0.2" in text
    assert "scorer: scorer in bfloat16" in text
    assert "| held-out text |" in text
    assert "autoregressive twin's likeliest next token" in text
    with (page / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    made = Counter((row["model"], row["sampler"], row["num_steps"], row["step"]) for row in rows)
    assert made == {
        ("XDLM k=0.2", "ancestral", "2", "2"): 1,
        ("XDLM k=0.2", "confidence", "2", "2"): 1,
        ("XDLM k=0.2", "ancestral", "1", "4"): 1,
        ("XDLM k=0.2", "ancestral", "2", "4"): 1,
        ("XDLM k=0.2", "confidence", "2", "4"): 1,
        ("autoregressive", "left_to_right", "0", "2"): 1,
        ("autoregressive", "left_to_right", "0", "4"): 1,
    }
    for picture in ("tradeoff", "reconstruction", "dynamics"):
        assert (page / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_measured_twice(sweep: Path, page: Path, tmp_path: Path) -> None:
    before = stamps(sweep)
    study(sweep, tmp_path, "--steps", "1", "2")
    assert stamps(sweep) == before
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.csv")} == {
        p.name: p.read_bytes() for p in page.glob("*.csv")
    }


def test_what_a_wider_protocol_lacks_and_what_is_not_the_study_s_is_measured(
    sweep: Path, page: Path, tmp_path: Path
) -> None:
    """An evaluation by another recipe, and a torn file, are not the study's."""
    before = stamps(sweep)
    run = next((sweep.parent / "runs/small").glob("*-xdlm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sweep.parent)
        assert (
            main(["evaluate", str(run / "recipe.yaml"), "evaluation.num_sequences=4", "--reconstruction"])
            == 0
        )
    torn = next(path for path in before if "confidence" in path.name and ".scores" in path.name)
    torn.write_text(torn.read_text()[:100])
    study(sweep, tmp_path, "--steps", "1", "2", "3")
    changed = {path for path, stamp in stamps(sweep).items() if before.get(path) != stamp}
    wider = {path for path in stamps(sweep) if "ancestral-3steps" in path.name}
    assert wider
    assert changed - wider == {
        run / "evaluations/step_00000004-ema.json",
        torn,
        torn.with_name(torn.name.replace(".scores", "")),
    }
    assert wider <= changed


def bound(model: str, seed: int, step: int, nats: float) -> BoundRow:
    return BoundRow(model, seed, step, nats, 0.01, nats, nats - 0.001)


def samples(model: str, seed: int, steps: int, bits: float, sampler: str = "ancestral") -> SampleRow:
    return SampleRow(
        model, seed, 9, sampler, steps, steps, math.log(100), bits, 3.0, 0.5, 0.0, 0.01, 1.0, 0.25
    )


def test_tables_are_over_seeds() -> None:
    """The interval of three values by hand: Student's 4.303 times their standard error; differences are
    paired, so that what the seeds share cancels.
    """
    assert over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / math.sqrt(3)))
    assert math.isnan(over_seeds([1.0]).half)
    results = Results(
        [bound(m, s, 9, 2.0 + s + d) for m, d in (("MDLM (k=0)", 0.0), ("UDLM (k=1)", 0.5)) for s in (1, 2)],
        [],
        [
            samples(m, s, n, s + d)
            for m, d in (("MDLM (k=0)", 0.0), ("UDLM (k=1)", -0.25))
            for s in (1, 2)
            for n in (4, 8)
        ],
        None,
        "bigrams",
        8,
    )
    assert "| MDLM (k=0) | 3.500 ± 6.353 |" in likelihood(results)
    assert "| UDLM (k=1) | 0.500 ± 0.000 | -0.250 ± 0.000 | -0.250 ± 0.000 |" in differences(results)
    assert "| UDLM (k=1) | 8 | 8 | 100 (100 to 100) | 1.250 ± 6.353 |" in generation(results)
    assert "| MDLM (k=0) | strict bound | 3.500 ± 6.353 |" in dynamics(results)
    assert "| UDLM (k=1) | gen. perplexity, ancestral | 100 (100 to 100) |" in dynamics(results)
