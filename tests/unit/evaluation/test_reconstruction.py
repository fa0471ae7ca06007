"""Right answers counted one by one, under the noise that the evaluator draws."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from tests.unit.evaluation.toy import MASK, Toy
from xdlm_megatron.evaluation.bound import NUM_BINS
from xdlm_megatron.evaluation.nelbo import NelboEvaluator
from xdlm_megatron.evaluation.reconstruction import KINDS, reconstruction
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_equals_a_count(k: float, mesh: Mesh) -> None:
    train = {"micro_batch_size": 7, "global_batch_size": 7}
    toy = Toy(mesh, k, t_min=0.05, evaluation={"num_noise_draws": 40}, train=train)
    evaluator = NelboEvaluator(toy.config, mesh, toy.samples(mesh), Objective(toy.noise, mesh), None)
    number = evaluator.num_rows
    batch = toy.samples(mesh).build(np.arange(number), np.arange(number), number)
    asked, right = Counter(), Counter()
    with torch.no_grad():
        logits_NSV = toy.chunks[0](batch.zt_BS).transpose(0, 1)
    for n in range(number):
        for s in range(batch.x0_BS.shape[1]):
            x0, z, t = (int(batch.x0_BS[n, s]), int(batch.zt_BS[n, s]), float(batch.t_BS[n, s]))
            kind = "masked" if z == MASK and k < 1 else "kept" if z == x0 else "replaced"
            if k == 0 and kind == "kept":
                continue
            key = kind, int((t - 0.05) / 0.95 * NUM_BINS)
            asked[key] += 1
            right[key] += int(logits_NSV[n, s, :MASK].argmax()) == x0
    found = reconstruction(evaluator, toy.chunks)
    assert {each.kind for each in found} == {kind for kind, _ in asked} <= set(KINDS)
    seen = 0
    for each in found:
        for bin_ in each.by_time:
            key = each.kind, round((bin_.start - 0.05) / 0.95 * NUM_BINS)
            assert bin_.num_tokens == asked[key]
            assert bin_.value.mean == pytest.approx(right[key] / asked[key], abs=1e-12)
            seen += bin_.num_tokens
    assert seen == asked.total()
