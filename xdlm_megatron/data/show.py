"""A noised batch for the eye: every sequence twice, as the data has it (x0) and as the model reads it (z_t).

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from xdlm_megatron.config.derive import batch_size_at, consumed_after
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.batch import Batch
from xdlm_megatron.data.build import build_train_samples, build_valid_samples
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.packing import PADDING
from xdlm_megatron.data.tokenizer import MASK_GLYPH

KEPT, MASKED, REPLACED, UNSCORED = range(4)
_RESET = "\x1b[0m"
_COLOURS = {MASKED: "\x1b[2m", REPLACED: "\x1b[33m", UNSCORED: "\x1b[36m"}
# Without colour a sign before the token must say it; a mask is a block in any case.
_SIGNS = {KEPT: "", MASKED: "", REPLACED: "~", UNSCORED: "="}
_BOUND = "┃"
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
        first_id = consumed_after(config.train, step - 1)
        batch_size = batch_size_at(config.train, first_id)
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

    A token that noise replaced by itself counts as kept: nobody can tell it from one. A bar stands between
    documents that attention keeps apart; positions after the last one are counted, not shown.
    """
    masked, replaced = _paint(MASK_GLYPH, MASKED, colour), _paint("token", REPLACED, colour)
    prompt = f"  {_paint('token', UNSCORED, colour)} prompt, no loss"
    lines = [f"kept  {masked} masked  {replaced} replaced"]
    for index, sample_id in enumerate(sample_ids):
        shown = _documents(batch, index) != PADDING
        x0, zt = batch.x0_BS[index][shown].tolist(), batch.zt_BS[index][shown].tolist()
        scored = batch.scored_BS[index][shown].tolist()
        codes = [classify(*token, mask_id) for token in zip(x0, zt, scored, strict=True)]
        if UNSCORED in codes and prompt:
            lines[0], prompt = lines[0] + prompt, ""
        bounds = _documents(batch, index)[shown].diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
        lines += [
            "",
            _heading(sample_id, batch, index, shown, codes),
            *_columns(token_strings(x0), token_strings(zt), codes, bounds, width, colour),
        ]
    return "\n".join(lines)


def _documents(batch: Batch, index: int) -> torch.Tensor:
    if batch.document_BT is None:
        return torch.zeros(batch.x0_BS.shape[1], dtype=torch.int32)
    return batch.document_BT[index]


def _heading(sample_id: int, batch: Batch, index: int, shown: torch.Tensor, codes: list[int]) -> str:
    """shown: bool [S]; padding has a time too, which is no document's."""
    times = batch.t_BS[index][shown].unique_consecutive()
    t = f"t={times[0]:.4f}  alpha={batch.alpha_BS[index][shown][0]:.4f}"
    if len(times) > 1:
        t = "t by document: " + " ".join(f"{time:.4f}" for time in times)
    kept, masked, replaced, unscored = (codes.count(code) for code in range(4))
    noised = (masked + replaced) / max(1, kept + masked + replaced)
    more = f", prompt {unscored}" if unscored else ""
    padding = batch.x0_BS.shape[1] - len(codes)
    more += f", padding {padding}" if padding else ""
    counts = f"kept {kept}, masked {masked}, replaced {replaced}{more}"
    return f"sample {sample_id}  {t}  noised {noised:.1%}: {counts}"


def classify(x0: int, zt: int, scored: bool, mask_id: int) -> int:
    """What noise did to a token: KEPT, MASKED or REPLACED; UNSCORED where it may do nothing."""
    if not scored:
        return UNSCORED
    if x0 == zt:
        return KEPT
    return MASKED if zt == mask_id else REPLACED


def _columns(
    clean: list[str], noised: list[str], codes: list[int], bounds: list[int], width: int, colour: bool
) -> Iterator[str]:
    """Pairs of lines of at most `width` characters, a token's two spellings one above the other."""
    above, below, length = "", "", 0
    for x0, zt, code, bound in zip(clean, noised, codes, bounds, strict=True):
        x0, sign = x0.translate(_CONTROLS), "" if colour else _SIGNS[code]
        zt = MASK_GLYPH if code == MASKED else zt.translate(_CONTROLS)
        bar = _BOUND if bound else ""
        size = max(_size(x0), _size(sign + zt)) + len(bar)
        if length and length + size > width - len(_NAMES[0]):
            yield from (_NAMES[0] + above.rstrip(), _NAMES[1] + below.rstrip(), "")
            above, below, length = "", "", 0
        above += bar + x0 + " " * (size - _size(bar + x0))
        fill = MASK_GLYPH if code == MASKED else " "
        text = zt + fill * (size - _size(bar + sign + zt))
        below += bar + _paint(text, code, colour)
        length += size
    yield from (_NAMES[0] + above.rstrip(), _NAMES[1] + below.rstrip())


def _size(text: str) -> int:
    """Terminal columns: wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _paint(text: str, code: int, colour: bool) -> str:
    if colour:
        return f"{_COLOURS[code]}{text}{_RESET}" if code in _COLOURS else text
    return _SIGNS[code] + text
