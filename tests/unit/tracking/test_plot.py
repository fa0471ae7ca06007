"""The picture of a run holds what metrics.jsonl holds, and the tool explains what it cannot draw."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from xdlm_megatron.tracking.jsonl import encode_line
from xdlm_megatron.tracking.plot import curve, draw_runs, read_run, save_figure, smooth

TOOL = Path(__file__).parents[3] / "tools" / "plot_run.py"


def write_run(run_dir, steps=200, tokens_per_step=1000, missing_tokens=0):
    run_dir.mkdir(parents=True)
    with open(run_dir / "metrics.jsonl", "wb") as file:
        for step in range(1, steps + 1):
            metrics = {
                "consumed_tokens": step * tokens_per_step - missing_tokens,
                "train/nelbo": math.nan if step == 7 else 2.0 + 5.0 / step,
                "train/lr": 1e-4,
                "train/grad_norm": 1.0,
            }
            file.write(encode_line(step, metrics, 1e9 + step))
            if step % 50 == 0:
                file.write(encode_line(step, {"eval/validation/nelbo_per_token": 2.5}, 1e9 + step))


def test_smooth_keeps_constants_and_straight_lines_and_tames_noise():
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    line = [float(x) for x in range(1000)]
    assert smooth(line)[500] == pytest.approx(500.0, abs=0.5)  # no lag
    noise = [(-1.0) ** x for x in range(1000)]
    assert max(map(abs, smooth(noise)[50:-50])) < 0.2
    assert smooth([]) == []
    assert smooth([1.0, 2.0]) == [1.0, 2.0]  # too few to smooth


def test_curve_leaves_out_what_cannot_be_drawn(tmp_path):
    write_run(tmp_path / "run", steps=10)
    steps, values = curve(read_run(tmp_path / "run"), "train/nelbo")
    assert steps == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert values[0] == 7.0


def test_figure_has_the_losses_the_references_and_a_token_axis(tmp_path):
    write_run(tmp_path / "run")
    figure = draw_runs({"run": read_run(tmp_path / "run")}, {"unigram entropy": 9.0})
    loss = figure.axes[0]
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["training", "validation (last 2.500)"]
    assert [text.get_text() for text in loss.texts] == ["unigram entropy 9.000"]
    low, high = loss.get_ylim()
    assert low < 2.0
    assert high > 9.0
    [token_axis] = loss.child_axes
    figure.draw_without_rendering()
    assert token_axis.get_xlim()[1] == pytest.approx(1000 * loss.get_xlim()[1])


def test_runs_of_different_batch_sizes_get_no_token_axis(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", tokens_per_step=2000)
    figure = draw_runs({name: read_run(tmp_path / name) for name in "ab"})
    assert figure.axes[0].child_axes == []
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0] == "a: training"
    assert labels[2] == "b: training"


def test_growing_batches_get_no_token_axis(tmp_path):
    write_run(tmp_path / "run", missing_tokens=500)
    assert draw_runs({"run": read_run(tmp_path / "run")}).axes[0].child_axes == []


def test_unknown_extension_is_refused(tmp_path):
    write_run(tmp_path / "run", steps=3)
    with pytest.raises(ValueError, match=r"must end in \.png"):
        save_figure(draw_runs({"run": read_run(tmp_path / "run")}), tmp_path / "loss.gif")


def run_tool(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_tool_draws_png_and_svg(tmp_path):
    write_run(tmp_path / "run")
    result = run_tool(tmp_path / "run", "--reference", "unigram entropy=9")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "run/figures/loss.png").read_bytes().startswith(b"\x89PNG")
    assert run_tool(tmp_path / "run", "--out", tmp_path / "new/loss.svg").returncode == 0
    assert "validation" in (tmp_path / "new/loss.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "metrics.jsonl is missing"),
        (["run", "--reference", "entropy"], "not NAME=VALUE"),
        (["run", "--reference", "entropy=nan"], "not NAME=VALUE with a number"),
        (["run", "run"], "need --out"),
    ],
)
def test_tool_errors_are_one_line(tmp_path, arguments, message):
    write_run(tmp_path / "run", steps=3)
    result = run_tool(tmp_path / arguments[0], *arguments[1:])
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
