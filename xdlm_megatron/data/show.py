"""A noised batch for the eye: every sequence twice, as the data has it (x0) and as the model reads it (z_t).

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.batch import Batch
from xdlm_megatron.data.build import build_train_samples, build_valid_samples
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.tokenizer import MASK_GLYPH

KEPT, MASKED, REPLACED = range(3)
_RESET = "\x1b[0m"
_COLOURS = {MASKED: "\x1b[2m", REPLACED: "\x1b[33m"}
# Without colour a sign before the token must say it; a mask is a block in any case.
_SIGNS = {KEPT: "", MASKED: "", REPLACED: "~"}
_NAMES = ("x0 ", "zt ")
_CONTROLS = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


def load_batch(config: RunConfig, step: int | None, num_samples: int) -> tuple[list[int], Batch]:
    """Sample ids and the batch of the first samples of a training step, or of the held-out set (step None).

    These are the very ids and bits that training reads at that step, on all its processes together.

    Raises:
        DataError: the data does not fit the recipe, or the step lies outside the run.
    """
    device = torch.device("cpu")
    if step is None:
        samples = build_valid_samples(config, device)
        batch_size = samples.index.num_samples * config.evaluation.num_noise_draws
        first_id = 0
    else:
        if not 1 <= step <= config.train.num_steps:
            raise DataError(
                f"step {step} is not of this run; choose one of 1 to train.num_steps={config.train.num_steps}"
            )
        samples = build_train_samples(config, device)
        batch_size = config.train.global_batch_size
        first_id = (step - 1) * batch_size
    slots = np.arange(min(num_samples, batch_size))
    return (first_id + slots).tolist(), samples.build(first_id + slots, slots, batch_size)


def render_batch(
    sample_ids: Sequence[int],
    batch: Batch,
    token_strings: Callable[[list[int]], list[str]],
    mask_id: int,
    width: int,
    colour: bool,
) -> str:
    """A legend, then for each sequence its time, its counts and its tokens, x0 above z_t, in columns.

    A token that noise replaced by itself counts as kept: nobody can tell it from one.
    """
    masked, replaced = _paint(MASK_GLYPH, MASKED, colour), _paint("token", REPLACED, colour)
    lines = [f"kept  {masked} masked  {replaced} replaced"]
    for index, sample_id in enumerate(sample_ids):
        x0, zt = batch.x0_BS[index].tolist(), batch.zt_BS[index].tolist()
        codes = [classify(a, b, mask_id) for a, b in zip(x0, zt, strict=True)]
        counts = [codes.count(code) for code in (KEPT, MASKED, REPLACED)]
        lines += [
            "",
            f"sample {sample_id}  t={batch.t_B[index]:.4f}  alpha={batch.alpha_B[index]:.4f}  "
            f"noised {1 - counts[KEPT] / len(x0):.1%}: kept {counts[0]}, masked {counts[1]}, "
            f"replaced {counts[2]}",
            *_columns(token_strings(x0), token_strings(zt), codes, width, colour),
        ]
    return "\n".join(lines)


def classify(x0: int, zt: int, mask_id: int) -> int:
    """What noise did to a token: KEPT, MASKED or REPLACED."""
    if x0 == zt:
        return KEPT
    return MASKED if zt == mask_id else REPLACED


def _columns(
    clean: list[str], noised: list[str], codes: list[int], width: int, colour: bool
) -> Iterator[str]:
    """Pairs of lines of at most `width` characters, a token's two spellings one above the other."""
    above, below, length = "", "", 0
    for x0, zt, code in zip(clean, noised, codes, strict=True):
        x0, sign = x0.translate(_CONTROLS), "" if colour else _SIGNS[code]
        zt = MASK_GLYPH if code == MASKED else zt.translate(_CONTROLS)
        size = max(_size(x0), _size(sign + zt))
        if length and length + size > width - len(_NAMES[0]):
            yield from (_NAMES[0] + above.rstrip(), _NAMES[1] + below.rstrip(), "")
            above, below, length = "", "", 0
        above += x0 + " " * (size - _size(x0))
        fill = MASK_GLYPH if code == MASKED else " "
        text = zt + fill * (size - _size(sign + zt))
        below += _paint(text, code, colour)
        length += size
    yield from (_NAMES[0] + above.rstrip(), _NAMES[1] + below.rstrip())


def _size(text: str) -> int:
    """Terminal columns: wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _paint(text: str, code: int, colour: bool) -> str:
    if colour:
        return f"{_COLOURS[code]}{text}{_RESET}" if code in _COLOURS else text
    return _SIGNS[code] + text
