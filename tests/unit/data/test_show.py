"""What is shown of a batch is what training reads, sign by sign."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from tests.unit.model.small import small_config
from xdlm_megatron.data.batch import Batch
from xdlm_megatron.data.build import build_train_samples, build_valid_samples
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.show import load_batch, render_batch

PIECES = {0: "a", 1: " be", 2: "\n", 3: " seen", 4: "日本", 9: "░"}


def batch_of(x0: list[int], zt: list[int]) -> Batch:
    one = torch.full((1, len(x0)), 0.25, dtype=torch.float64)
    scored_BS = torch.ones(1, len(x0), dtype=torch.bool)
    return Batch(torch.tensor([x0]), torch.tensor([zt]), one, 1 - one, one, one, scored_BS)


def render(x0: list[int], zt: list[int], width: int = 60, colour: bool = False) -> list[str]:
    strings = lambda ids: [PIECES[i] for i in ids]  # noqa: E731
    return render_batch([7], batch_of(x0, zt), strings, 9, width, colour).splitlines()


def test_columns_and_signs_without_colour() -> None:
    assert render([0, 1, 3, 2, 4, 0], [0, 9, 1, 2, 9, 3]) == [
        "kept  ░ masked  ~token replaced",
        "",
        "sample 7  t=0.2500  alpha=0.7500  noised 66.7%: kept 2, masked 2, replaced 2",
        "x0 a be seen⏎日本a",
        "zt a░░░~ be ⏎░░░░~ seen",
    ]


def test_colours_instead_of_signs() -> None:
    lines = render([0, 1, 3], [0, 9, 1], colour=True)
    assert lines[-1] == "zt a\x1b[2m░░░\x1b[0m\x1b[33m be  \x1b[0m"
    assert re.sub("\x1b\\[[0-9;]*m", "", lines[-2]) == "x0 a be seen"


def test_documents_prompts_and_padding() -> None:
    """Two documents with their times, the first with a prompt; two positions of padding."""
    batch = dataclasses.replace(
        batch_of([1, 0, 3, 0, 1, 0, 0], [1, 9, 3, 3, 9, 0, 0]),
        t_BS=torch.tensor([[0.25] * 3 + [0.5] * 2 + [0.125] * 2], dtype=torch.float64),
        scored_BS=torch.tensor([[False, True, True, True, True, False, False]]),
        document_BT=torch.tensor([[0, 0, 0, 1, 1, -1, -1]], dtype=torch.int32),
    )
    strings = lambda ids: [PIECES[i] for i in ids]  # noqa: E731
    assert render_batch([7], batch, strings, 9, 60, colour=False).splitlines() == [
        "kept  ░ masked  ~token replaced  =token prompt, no loss",
        "",
        "sample 7  t by document: 0.2500 0.5000  noised 75.0%: "
        "kept 1, masked 2, replaced 1, prompt 1, padding 2",
        "x0  be a seen┃a      be",
        "zt = be░ seen┃~ seen░░░",
    ]
    assert "\x1b[36m be\x1b[0m" in render_batch([7], batch, strings, 9, 60, colour=True)


def test_padding_around_one_document_has_no_time() -> None:
    """Its own t and alpha are shown, whatever stands at the positions that are not."""
    batch = dataclasses.replace(
        batch_of([0, 1, 0], [0, 9, 0]),
        t_BS=torch.tensor([[0.125, 0.25, 0.5]], dtype=torch.float64),
        alpha_BS=torch.tensor([[0.875, 0.75, 0.5]], dtype=torch.float64),
        document_BT=torch.tensor([[-1, 0, -1]], dtype=torch.int32),
    )
    lines = render_batch([7], batch, lambda ids: [PIECES[i] for i in ids], 9, 60, colour=False).splitlines()
    assert (
        lines[2] == "sample 7  t=0.2500  alpha=0.7500  noised 100.0%: kept 0, masked 1, replaced 0, padding 2"
    )


@pytest.mark.parametrize("width", [12, 20, 37])
def test_lines_break_between_tokens_and_stay_narrow(width: int) -> None:
    ids = [1, 3, 0, 1, 1, 3] * 5
    lines = render(ids, [9 if i % 4 == 1 else x for i, x in enumerate(ids)], width)[3:]
    assert max(map(len, lines)) <= width
    assert (
        "".join(line[3:] for line in lines if line.startswith("x0")).replace(" ", "") == "beseenabebeseen" * 5
    )


def test_training_reads_these_bits(tiny_recipe: dict) -> None:
    config = small_config(tiny_recipe)
    batch_size = config.train.global_batch_size
    whole = build_train_samples(config, torch.device("cpu"))
    for step, num_samples in ((1, 3), (4, 100)):
        ids, batch = load_batch(config, step, num_samples)
        slots = np.arange(batch_size)
        expected = whole.build((step - 1) * batch_size + slots, slots, batch_size)
        count = min(num_samples, batch_size)
        assert ids == list(range((step - 1) * batch_size, (step - 1) * batch_size + count))
        assert torch.equal(batch.x0_BS, expected.x0_BS[:count])
        assert torch.equal(batch.zt_BS, expected.zt_BS[:count])
        assert torch.equal(batch.t_BS, expected.t_BS[:count])


def test_evaluation_reads_these_bits(tiny_recipe: dict) -> None:
    config = small_config(tiny_recipe, evaluation={"num_sequences": 6, "num_noise_draws": 2})
    ids, batch = load_batch(config, None, 100)
    assert ids == list(range(12))
    slots = np.arange(12)
    expected = build_valid_samples(config, torch.device("cpu")).build(slots, slots, 12)
    assert torch.equal(batch.zt_BS, expected.zt_BS)


@pytest.mark.parametrize("step", [0, -1, 21])
def test_a_step_outside_the_run_is_refused(tiny_recipe: dict, step: int) -> None:
    with pytest.raises(
        DataError, match=rf"step {step} is not of this run; choose one of 1 to train.num_steps=20"
    ):
        load_batch(small_config(tiny_recipe), step, 1)


def test_training_reads_these_samples_while_batches_grow(tiny_recipe: dict) -> None:
    """Batches of 4, 4, 6, 6 and 8: step 5 begins with sample 20."""
    config = small_config(tiny_recipe, train={"rampup_batch_size": [4, 2, 16]})
    ids, batch = load_batch(config, 5, 100)
    assert ids == list(range(20, 28))
    whole = build_train_samples(config, torch.device("cpu"))
    assert torch.equal(batch.zt_BS, whole.build(np.arange(20, 28), np.arange(8), 8).zt_BS)
    assert load_batch(config, 3, 100)[0] == list(range(8, 14))
