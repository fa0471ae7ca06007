"""The autoregressive twin: causal, normalised, and trained by the cross-entropy of the next token."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.unit.model.small import small_config
from tests.unit.model.test_objective import noisy_batch
from xdlm_megatron.config.samplers import LeftToRightSampler
from xdlm_megatron.data.build import build_noise, build_schedule
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.evaluation.generation import SampleOptions, build_denoiser, generate
from xdlm_megatron.model.build import build_model, unwrap
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh

TWIN = {
    "diffusion": {"uniform_ratio": 0.0},
    "sampling": {"kind": "left_to_right"},
}
SHARP = {"autoregressive": True, "zero_init_head": False, "init_method_std": 0.4}
MASK_NOISE = StationaryNoise(0.0, 45, 44)


def build_twin(mesh: Mesh, **sections: dict):
    config = small_config(model=SHARP, **TWIN, **sections)
    return config, build_model(config, mesh)[0].eval()


@torch.no_grad()
def test_a_token_changes_what_comes_after_it_and_nothing_else(mesh: Mesh) -> None:
    _, model = build_twin(mesh)
    ids_BS = torch.randint(44, (1, 12), generator=torch.Generator().manual_seed(1))
    before_SP = model(ids_BS)[:, 0]
    for position in range(12):
        other_BS = ids_BS.clone()
        other_BS[0, position] = (ids_BS[0, position] + 1) % 44
        changed_S = (model(other_BS)[:, 0] != before_SP).any(1)
        assert changed_S.tolist() == [later > position for later in range(12)]


@torch.no_grad()
def test_documents_do_not_see_each_other(mesh: Mesh) -> None:
    """The second document's logits are those of it alone, in front of the sequence."""
    _, model = build_twin(mesh, data={"packing": "documents"})
    ids_BS = torch.randint(44, (1, 12), generator=torch.Generator().manual_seed(1))
    document_BT = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    both_SP = model(ids_BS, document_BT)[:, 0]
    alone_SP = model(ids_BS.roll(-5, 1), torch.tensor([[1] * 7 + [2] * 5], dtype=torch.int32))[:, 0]
    torch.testing.assert_close(both_SP[5:], alone_SP[:7], rtol=1e-5, atol=1e-5)
    other_BS = ids_BS.clone()
    other_BS[0, :5] = 7
    torch.testing.assert_close(model(other_BS, document_BT)[5:, 0], both_SP[5:], rtol=0, atol=0)


@pytest.mark.parametrize("fuse_head", ["never", "always"])
def test_the_loss_is_cross_entropy_whatever_the_noise(fuse_head: str, mesh: Mesh) -> None:
    _, model = build_twin(mesh)
    parameters = list(unwrap(model).parameters())
    batch = noisy_batch(MASK_NOISE)
    scored_BS = torch.ones(3, 12, dtype=torch.bool)
    scored_BS[1, :4] = False
    batch = dataclasses.replace(batch, scored_BS=scored_BS, dalpha_BS=batch.dalpha_BS * scored_BS)
    logits_BSV = model(batch.x0_BS).transpose(0, 1)[..., :44]  # without mask and padding
    nats_BS = cross_entropy(logits_BSV.flatten(0, 1), batch.x0_BS.flatten(), reduction="none").view(3, 12)
    expected = torch.autograd.grad((nats_BS * scored_BS).sum(), parameters)

    output, loss_function = Objective(MASK_NOISE, mesh, fuse_head=fuse_head).forward_step(
        iter([batch]), model
    )
    loss, count, report = loss_function(output)
    assert count.item() == 32
    wanted_B = (nats_BS * scored_BS).sum(1).detach()
    torch.testing.assert_close(report["nelbo_per_sequence"], wanted_B, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_samples_follow_the_law_of_the_conditionals(mesh: Mesh) -> None:
    """All 27 texts of three tokens: their probabilities sum to 1, and samples occur as often as they say."""
    data = {"seq_length": 3, "vocab_size": 4, "mask_id": 3, "make_vocab_size_divisible_by": 4}
    config, model = build_twin(mesh, data=data)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        log_p = model(texts).transpose(0, 1)[..., :3].double().log_softmax(-1)
    p_T = log_p.gather(-1, texts[..., None])[..., 0].sum(1).exp()
    assert p_T.sum().item() == pytest.approx(1, abs=1e-6)
    assert p_T.max() > 3 * p_T.min()
    number = 8000
    samples = generate(
        build_denoiser([model], mesh),
        SampleOptions(num_samples=number),
        LeftToRightSampler(kind="left_to_right"),
        build_noise(config),
        build_schedule(config.diffusion),
        torch.full((3,), -1),
        batch_size=4000,
    )
    assert samples.evaluations.unique().tolist() == [3]
    counts_T = torch.bincount(samples.ids @ torch.tensor([9, 3, 1]), minlength=27)
    chi_square = ((counts_T - number * p_T) ** 2 / (number * p_T)).sum().item()
    assert chi_square < 55  # 26 degrees of freedom: above it once in 1300
