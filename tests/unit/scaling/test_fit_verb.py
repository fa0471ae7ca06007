"""`fit` as a user runs it: files, table, mistakes; the same bytes twice; no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.unit.scaling.synthetic import QUOKKA, draw_runs, write_table
from xdlm_megatron.__main__ import main

COLUMNS = ("run", "params", "tokens", "loss", "flops", "uniform_ratio")
OTHER = (2.27, 626.0, 1520.0, 0.350, 0.353)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ratios of known laws, and two rows that are none."""
    points = draw_runs(0, uniform_ratio=0.0) + draw_runs(1, truth=OTHER, uniform_ratio=1.0)
    path = write_table(tmp_path_factory.mktemp("table") / "points.csv", points, COLUMNS)
    path.write_text(path.read_text() + "bad,1e8,1e9,<b>x</b>,1,0\nworse,1e8,1e9,-3,1,0\n")
    return path


@pytest.fixture(scope="module")
def output(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit") / "new/report"
    assert main(["fit", "--points", str(table), "--output", str(folder), "--draws", "40"]) == 0
    return folder


def test_every_file_is_there(output: Path) -> None:
    figures = ("frontier", "valleys", "n_opt", "residuals", "by_ratio")
    names = {f"{figure}.{suffix}" for figure in figures for suffix in ("png", "svg")}
    assert {path.name for path in output.iterdir()} == names | {"fit.json", "report.html"}
    for path in output.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in output.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_the_json_holds_each_ratio_on_its_own(output: Path) -> None:
    tree = json.loads((output / "fit.json").read_text())
    assert tree["num_points"] == 84
    assert [row["reason"] for row in tree["skipped"]] == [
        "loss is '<b>x</b>', not a number",
        "loss is -3, not a positive number",
    ]
    for series, ratio, truth in zip(tree["series"], (0.0, 1.0), (QUOKKA, OTHER), strict=True):
        assert series["uniform_ratio"] == ratio
        assert series["num_points"] == 42
        assert set(series["methods"]) == {"huber", "squares", "valleys"}
        alpha = series["methods"]["huber"]["coefficients"]["alpha"]
        assert alpha["value"] == pytest.approx(truth[3], abs=0.03)
        assert alpha["interval"][0] < alpha["value"] < alpha["interval"][1]
        assert len(series["methods"]["valleys"]["budgets"]) == 6
        assert len(series["points"]) == 42


class _Page(HTMLParser):
    """Collects what a page asks of the network, its ids and the tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.asks: list[str] = []
        self.ids: list[str] = []
        self.used: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value:
                if value.startswith("#"):
                    self.used.append(value)
                elif not value.startswith("data:image/png;base64,"):  # the colour bar
                    self.asks.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_the_report_stands_alone(output: Path) -> None:
    text = (output / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.asks == []
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!#)", text)
    assert page.tags.count("svg") == 5
    assert len(set(page.ids)) == len(page.ids)  # five drawings in one page keep their names apart
    assert {used.removeprefix("#") for used in page.used} <= set(page.ids)
    assert "prefers-color-scheme: dark" in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "<b>x</b>" not in text
    for colour in ("#374151", "#e5e7eb", "#ffffff"):
        assert not re.search(rf"(fill|stroke): ?{colour}", text)  # black on black in the dark


def test_the_same_points_give_the_same_bytes(table: Path, output: Path, tmp_path: Path) -> None:
    assert main(["fit", "--points", str(table), "--output", str(tmp_path), "--draws", "40"]) == 0
    for path in output.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_table_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    points = write_table(tmp_path / "p.csv", draw_runs(0)[:14], COLUMNS[1:4])
    arguments = ["fit", "--points", str(points), "--output", str(tmp_path / "o"), "--draws", "40"]
    assert main([*arguments, "--flops", "1e21", "--level", "0.8"]) == 0
    said = capfd.readouterr()
    assert "14 runs, 0 skipped; 80% intervals" in said.out
    assert "all runs: 14 runs, 2 FLOPs budgets" in said.out
    assert re.search(r"huber +E 2\.\d+ \[", said.out)
    assert re.search(r"C 1\.00e\+21: N_opt \d\S+ \[\S+, \S+\] \(squares \S+\), D \S+, L 2\.\d+ \[", said.out)
    assert max(map(len, said.out.split("wrote ")[0].splitlines())) < 150
    assert "not supported: N_opt by valleys: 2 of 2 budgets" in said.out
    assert "report.html" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "fit needs one source: run folders, --points FILE.csv, or --mlflow URI"),
        (["--points", "none.csv"], "none.csv: No such file or directory"),
        (["nowhere"], "nowhere: neither a run folder nor a folder of them"),
        (["--points", "a.csv", "--draws", "3"], "--draws: must be a whole number of at least 20"),
        (["--points", "a.csv", "--level", "90"], "--level: must be in (0, 1)"),
        (["--points", "a.csv", "--flops", "-1"], "--flops: "),
        (["--points", "a.csv", "--count", "all"], "--count: invalid choice: 'all'"),
    ],
)
def test_mistakes(capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    try:
        status = main(["fit", *arguments])
    except SystemExit as stop:
        status = stop.code
    said = capfd.readouterr().err
    assert status == 2
    assert message in said
    assert "Traceback" not in said


def test_no_torch_is_imported(table: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--points", str(table), "--output", str(tmp_path), "--draws", "20"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\nfrom xdlm_megatron.__main__ import main\nassert main({arguments!r}) == 0\n"
            "print('heavy:', [m for m in ('torch', 'megatron', 'mlflow') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
