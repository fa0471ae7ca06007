"""Looking at a sampling run: which positions each reverse step revealed, refined or masked again.

MDLM only reveals masks. With uniform noise in the mixture a step may also turn a token into another one
(refined) or back into a mask (re-masked), which is how a sample corrects itself. NumPy only.

Legend of shape suffixes: S positions, T snapshots.
"""

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

UNCHANGED, MASKED, REVEALED, REFINED, REMASKED = range(5)
NAMES = ("unchanged", "masked", "revealed", "refined", "re-masked")
MASK_GLYPH = "░"

_RESET = "\x1b[0m"
_COLOURS = {MASKED: "\x1b[2m", REVEALED: "\x1b[32m", REFINED: "\x1b[33m", REMASKED: "\x1b[1;35m"}
# Without colour a sign before the token must say it; a re-masked position is a darker block in any case.
_SIGNS = {REVEALED: "+", REFINED: "~"}
_REMASKED_GLYPH = "▓"
_PICTURE_COLOURS = ("#ffffff", "#d1d5db", "#2c8c5a", "#e0a526", "#b3243f")

TokenStrings = Callable[[Sequence[int]], list[str]]


def classify(
    previous_S: NDArray[np.integer], current_S: NDArray[np.integer], mask_id: int | None
) -> NDArray[np.int8]:
    """What one step did to each position: UNCHANGED, MASKED (still), REVEALED, REFINED or REMASKED.

    `mask_id` None is pure uniform noise: every change is REFINED. Raises ValueError for unequal lengths.
    """
    if previous_S.shape != current_S.shape or current_S.ndim != 1:
        raise ValueError(
            f"snapshots of shapes {previous_S.shape} and {current_S.shape} are not two rows of one sample"
        )
    codes_S = np.where(previous_S == current_S, UNCHANGED, REFINED).astype(np.int8)
    if mask_id is not None:
        was_S, is_S = previous_S == mask_id, current_S == mask_id
        codes_S[was_S & is_S] = MASKED
        codes_S[was_S & ~is_S] = REVEALED
        codes_S[~was_S & is_S] = REMASKED
    return codes_S


def render_trace(
    snapshots_TS: Sequence[NDArray[np.integer]],
    times_T: Sequence[float],
    token_strings: TokenStrings,
    mask_id: int | None,
    *,
    max_frames: int = 12,
    width: int = 100,
    colour: bool = True,
) -> str:
    """The run as text: a legend, then up to `max_frames` snapshots, each against the one shown before it.

    The snapshots shown are spread evenly over the run, first and last among them; with fewer frames than
    steps, a position is compared over the steps between two frames. Each has a head with time and counts.
    """
    if not snapshots_TS or len(snapshots_TS) != len(times_T):
        raise ValueError(f"{len(snapshots_TS)} snapshots with {len(times_T)} times; give one time a snapshot")
    shown = choose_frames(len(snapshots_TS), max_frames)
    lines = [_legend(colour, mask_id), ""]
    previous_S = snapshots_TS[shown[0]]
    for index in shown:
        current_S = snapshots_TS[index]
        codes_S = classify(previous_S, current_S, mask_id)
        lines.append(f"step {index}/{len(snapshots_TS) - 1}  t={times_T[index]:.3f}  {_counts(codes_S)}")
        lines += [f"  {line}" for line in _wrap(current_S, codes_S, token_strings, width - 2, colour)]
        lines.append("")
        previous_S = current_S
    return "\n".join(lines)


def print_trace(
    snapshots_TS: Sequence[NDArray[np.integer]],
    times_T: Sequence[float],
    token_strings: TokenStrings,
    mask_id: int | None,
    *,
    max_frames: int = 12,
    stream: TextIO | None = None,
) -> None:
    """Print `render_trace` for this stream (stdout): its width, and colour on a terminal without NO_COLOR."""
    stream = sys.stdout if stream is None else stream
    text = render_trace(
        snapshots_TS,
        times_T,
        token_strings,
        mask_id,
        max_frames=max_frames,
        width=shutil.get_terminal_size((100, 24)).columns,
        colour=stream.isatty() and not os.environ.get("NO_COLOR"),
    )
    print(text, file=stream)


def draw_trace(
    snapshots_TS: Sequence[NDArray[np.integer]],
    times_T: Sequence[float],
    mask_id: int | None,
    path: str | Path,
) -> None:
    """Write a heat map, steps down and positions across, in the colours of the classes (PNG, SVG or PDF)."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if len(snapshots_TS) < 2 or len(snapshots_TS) != len(times_T):
        raise ValueError(
            f"{len(snapshots_TS)} snapshots with {len(times_T)} times; give two or more, one time each"
        )
    codes_TS = np.stack(
        [classify(previous_S, current_S, mask_id) for previous_S, current_S in pairwise(snapshots_TS)]
    )
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        codes_TS,
        cmap=ListedColormap(list(_PICTURE_COLOURS)),
        vmin=-0.5,
        vmax=len(NAMES) - 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, codes_TS.shape[1] - 0.5, len(snapshots_TS) - 0.5, 0.5),  # the first step is row 1
    )
    axes.set_xlabel("position")
    axes.set_ylabel(f"reverse step (t from {times_T[0]:.2f} to {times_T[-1]:.2f})")
    totals = np.bincount(codes_TS.ravel(), minlength=len(NAMES))
    axes.legend(
        handles=[
            Patch(
                facecolor=_PICTURE_COLOURS[code], edgecolor="#9ca3af", label=f"{NAMES[code]} ({totals[code]})"
            )
            for code in range(len(NAMES))
            if totals[code]
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(NAMES),
        frameon=False,
    )
    figure.savefig(path, dpi=160)


def choose_frames(num_snapshots: int, max_frames: int) -> list[int]:
    """Up to `max_frames` indices spread evenly over the snapshots, first and last among them."""
    if max_frames < 2:
        raise ValueError(f"max_frames={max_frames} must be at least 2: the start and the end")
    return sorted({int(i) for i in np.linspace(0, num_snapshots - 1, min(max_frames, num_snapshots)).round()})


def _legend(colour: bool, mask_id: int | None) -> str:
    revealed, refined = (
        _paint(name, code, colour) for name, code in (("revealed", REVEALED), ("refined", REFINED))
    )
    if mask_id is None:
        return refined
    masked, remasked = _paint(MASK_GLYPH, MASKED, colour), _paint(_REMASKED_GLYPH, REMASKED, colour)
    return f"{masked} masked  {revealed}  {refined}  {remasked} masked again"


def _counts(codes_S: NDArray[np.int8]) -> str:
    totals = np.bincount(codes_S, minlength=len(NAMES))
    return "  ".join(f"{NAMES[code]} {totals[code]}" for code in (REVEALED, REFINED, REMASKED, MASKED))


def _wrap(
    ids_S: NDArray[np.integer],
    codes_S: NDArray[np.int8],
    token_strings: TokenStrings,
    width: int,
    colour: bool,
) -> list[str]:
    """The painted tokens in lines of at most `width` characters; a line breaks between tokens only."""
    lines, line, length = [], "", 0
    for text, code in zip(token_strings(ids_S.tolist()), codes_S.tolist(), strict=True):
        if code in (MASKED, REMASKED):
            text = MASK_GLYPH if code == MASKED else _REMASKED_GLYPH
        text = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
        size = _columns(text) + (0 if colour else len(_SIGNS.get(code, "")))
        if length and length + size > width:
            lines.append(line)
            line, length = "", 0
        line += _paint(text, code, colour)
        length += size
    return [*lines, line]


def _columns(text: str) -> int:
    """Terminal columns: wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _paint(text: str, code: int, colour: bool) -> str:
    if colour:
        return f"{_COLOURS[code]}{text}{_RESET}" if code in _COLOURS else text
    return _SIGNS.get(code, "") + text
