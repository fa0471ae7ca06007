"""The trace of a sampling run says what happened to each position, with and without colour."""

import io
import json
import re

import numpy as np
import pytest

from xdlm_megatron.evaluation.trace import (
    MASKED,
    REFINED,
    REMASKED,
    REVEALED,
    UNCHANGED,
    choose_frames,
    classify,
    draw_trace,
    print_trace,
    render_trace,
)
from xdlm_megatron.evaluation.trace_page import write_trace_page

MASK = 9
WORDS = dict(enumerate(["the ", "cat ", "sat ", "on ", "a ", "mat\n", "漢字", "dog "]))
SNAPSHOTS = [np.array(row) for row in ([9, 9, 9, 9], [0, 7, 9, 9], [0, 1, 2, 9], [0, 9, 2, 5], [0, 1, 2, 5])]
TIMES = [1.0, 0.75, 0.5, 0.25, 0.0]


def strings(ids):
    return [WORDS.get(i, "[MASK]") for i in ids]


def without_colour(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_classify_names_each_pair_of_states():
    previous, current = np.array([9, 9, 1, 1, 1]), np.array([9, 1, 1, 2, 9])
    assert classify(previous, current, MASK).tolist() == [MASKED, REVEALED, UNCHANGED, REFINED, REMASKED]


def test_without_a_mask_every_change_is_a_refinement():
    codes = classify(np.array([9, 1, 2]), np.array([1, 9, 2]), None)
    assert codes.tolist() == [REFINED, REFINED, UNCHANGED]


def test_classify_refuses_rows_of_different_lengths():
    with pytest.raises(ValueError, match="not two rows of one sample"):
        classify(np.array([1, 2]), np.array([1]), MASK)


def test_plain_text_marks_every_kind_of_change():
    text = render_trace(SNAPSHOTS, TIMES, strings, MASK, colour=False)
    assert "\x1b" not in text
    assert "[MASK]" not in text
    lines = text.splitlines()
    assert lines[0] == "░ masked  +revealed  ~refined  ▓ masked again"
    heads = [line for line in lines if line.startswith("step")]
    assert heads[0] == "step 0/4  t=1.000  revealed 0  refined 0  re-masked 0  masked 4"
    assert heads[2] == "step 2/4  t=0.500  revealed 1  refined 1  re-masked 0  masked 1"
    bodies = [line[2:] for line in lines if line.startswith("  ")]
    assert bodies == [
        "░░░░",
        "+the +dog ░░",
        "the ~cat +sat ░",
        "the ▓sat +mat⏎",
        "the +cat sat mat⏎",
    ]


def test_colours_paint_the_same_tokens():
    text = render_trace(SNAPSHOTS, TIMES, strings, MASK, colour=True)
    assert "\x1b[32mthe \x1b[0m" in text
    assert "\x1b[33mcat \x1b[0m" in text
    assert "\x1b[1;35m▓\x1b[0m" in text
    assert "the cat sat mat⏎" in without_colour(text)


def test_lines_keep_to_the_width_and_wide_characters_count_twice():
    snapshots = [np.full(40, 6), np.full(40, 6)]
    text = render_trace(snapshots, [1.0, 0.0], strings, MASK, width=22, colour=False)
    bodies = [line for line in text.splitlines() if line.startswith("  ")]
    assert [len(line) for line in bodies[:8]] == [2 + 10] * 8  # five pairs of two columns a character
    assert sum(line.count("漢字") for line in bodies) == 80


def test_frames_are_spread_evenly_with_both_ends():
    assert choose_frames(5, 12) == [0, 1, 2, 3, 4]
    assert choose_frames(101, 5) == [0, 25, 50, 75, 100]
    assert choose_frames(1, 5) == [0]
    with pytest.raises(ValueError, match="at least 2"):
        choose_frames(5, 1)


def test_counts_span_the_steps_between_frames():
    text = render_trace(SNAPSHOTS, TIMES, strings, MASK, max_frames=2, colour=False)
    assert "step 4/4  t=0.000  revealed 4  refined 0  re-masked 0  masked 0" in text


def test_snapshots_need_a_time_each():
    with pytest.raises(ValueError, match="5 snapshots with 1 times"):
        render_trace(SNAPSHOTS, [1.0], strings, MASK)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "no_color", "coloured"),
    [(Terminal, None, True), (Terminal, "1", False), (Terminal, "", True), (io.StringIO, None, False)],
)
def test_colour_only_on_a_terminal_that_wants_it(monkeypatch, stream, no_color, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    out = stream()
    print_trace(SNAPSHOTS, TIMES, strings, MASK, stream=out)
    assert ("\x1b" in out.getvalue()) == coloured


def test_heat_map_is_written(tmp_path):
    draw_trace(SNAPSHOTS, TIMES, MASK, tmp_path / "trace.svg")
    assert (tmp_path / "trace.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="two or more"):
        draw_trace(SNAPSHOTS[:1], TIMES[:1], MASK, tmp_path / "trace.png")


def read_page(path):
    """The states that the page's script rebuilds, and its data."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    data = json.loads(text)
    states = [np.array(data["start"])]
    for changes in data["changes"]:
        state = states[-1].copy()
        state[changes[::2]] = changes[1::2]
        states.append(state)
    return states, data


def test_the_page_holds_every_step_and_needs_nothing_else(tmp_path):
    page = tmp_path / "folder/trace.html"
    observed = np.array([True, False, False, False])
    write_trace_page(SNAPSHOTS, TIMES, strings, MASK, observed, page, "title", "facts")
    states, data = read_page(page)
    assert [state.tolist() for state in states] == [ids.tolist() for ids in SNAPSHOTS]
    assert (data["times"], data["mask"], data["observed"]) == (TIMES, MASK, [0])
    assert data["strings"] == {
        "0": "the ",
        "1": "cat ",
        "2": "sat ",
        "5": "mat\n",
        "7": "dog ",
        "9": "[MASK]",
    }
    assert not re.search(r"https?:|src=|href=", page.read_text())


def test_text_of_a_sample_cannot_end_the_script(tmp_path):
    page = tmp_path / "trace.html"
    nobody = np.zeros(4, dtype=bool)
    write_trace_page(SNAPSHOTS, TIMES, lambda ids: ["</script><b>"] * len(ids), MASK, nobody, page, "<i>")
    _, data = read_page(page)
    assert data["strings"]["0"] == "</script><b>"
    assert data["title"] == "<i>"
    with pytest.raises(ValueError, match="give two or more"):
        write_trace_page(SNAPSHOTS[:1], TIMES[:1], strings, MASK, nobody, page, "")
