"""Which losses are called spikes, against the definition."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from xdlm_megatron.tracking.jsonl import decode_line
from xdlm_megatron.train.spikes import (
    ENOUGH,
    NUM_WORST,
    WINDOW,
    Spike,
    append_spike,
    remember,
    threshold_of,
    worst_samples,
)


def test_robust_deviations_are_standard_deviations_of_a_normal_law() -> None:
    losses = (5 + 0.25 * torch.randn(20_001, generator=torch.Generator().manual_seed(1))).tolist()
    median, threshold = threshold_of(losses, 4.0)
    assert median == statistics.median(losses)
    assert threshold == pytest.approx(5 + 4 * 0.25, rel=0.01)


def test_a_few_wild_losses_hardly_move_it() -> None:
    calm = [5 + 0.01 * (n % 7) for n in range(WINDOW)]
    before, after = threshold_of(calm, 10.0), threshold_of(calm[:-5] + [1e6] * 5, 10.0)
    assert after[1] - before[1] < 0.2


def test_little_is_known_of_few_or_equal_losses() -> None:
    losses = [float(n) for n in range(ENOUGH)]
    assert threshold_of(losses[:-1], 10.0) is None
    assert threshold_of(losses, 10.0) is not None
    assert threshold_of([3.0] * WINDOW, 10.0) is None


def test_the_window_slides() -> None:
    recent: list[float] = []
    for loss in range(WINDOW + 5):
        remember(recent, float(loss))
    assert recent == [float(loss) for loss in range(5, WINDOW + 5)]


def test_worst_samples_have_ids_of_the_global_order() -> None:
    loss = torch.tensor([1.0, 7.0, 3.0], dtype=torch.float64)
    assert worst_samples(loss, 40) == [(41, 7.0), (42, 3.0), (40, 1.0)]
    assert len(worst_samples(torch.arange(100.0), 0)) == NUM_WORST


def test_nan_is_the_worst_of_all() -> None:
    loss = torch.tensor([1.0, math.inf, math.nan, 3.0, -math.inf, math.nan], dtype=torch.float64)
    worst = worst_samples(loss, 40)
    assert {sample for sample, _ in worst[:2]} == {42, 45}
    assert all(math.isnan(loss) for _, loss in worst[:2])
    assert worst[2:] == [(41, math.inf), (43, 3.0), (40, 1.0), (44, -math.inf)]


def test_a_loss_that_is_not_finite_is_valid_json(tmp_path: Path) -> None:
    spike = Spike(7, math.nan, math.nan, math.nan, worst=[(41, math.nan), (3, math.inf), (4, 2.0)])
    append_spike(tmp_path, spike)
    line = (tmp_path / "spikes.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [record[name] for name in ("loss", "median", "threshold")] == ["NaN"] * 3
    assert [sample["loss"] for sample in record["worst"]] == ["NaN", "Infinity", 2.0]
    assert math.isnan(decode_line(line.encode())["loss"])
    assert str(spike) == "step 7: the loss is nan; samples with the largest loss: 41 (nan), 3 (inf), 4 (2.00)"


def test_a_report_is_a_line_of_json_and_a_line_of_words(tmp_path: Path) -> None:
    spike = Spike(step=7, loss=9.5, median=4.0, threshold=5.5, worst=[(41, 30.0), (3, 20.0)])
    append_spike(tmp_path, spike)
    append_spike(tmp_path, spike)
    lines = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert lines[0] == lines[1]
    assert (lines[0]["step"], lines[0]["loss"]) == (7, 9.5)
    assert lines[0]["worst"] == [{"sample": 41, "loss": 30.0}, {"sample": 3, "loss": 20.0}]
    assert str(spike).count("\n") == 0
    assert "step 7: loss 9.5000 is a spike, above 5.5000" in str(spike)
    assert "41 (30.00), 3 (20.00)" in str(spike)
