"""Documents of a packed sequence do not see each other: the model treats each as if it were alone."""

from __future__ import annotations

import pytest
import torch

from tests.unit.model.small import small_config
from xdlm_megatron.data.batch import Batch
from xdlm_megatron.data.packing import PADDING
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.model.build import build_model
from xdlm_megatron.model.dlm import positions_within
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh

LIVELY = {"zero_init_head": False, "init_method_std": 0.3}
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2], [0] * 7 + [PADDING] * 5], dtype=torch.int32)


def pieces(document_T: torch.Tensor) -> list[slice]:
    """Where each document lies, padding left out."""
    spans = []
    for number in range(int(document_T.max()) + 1):
        places = (document_T == number).nonzero()[:, 0]
        spans.append(slice(int(places[0]), int(places[-1]) + 1))
    return spans


def test_positions_restart() -> None:
    assert positions_within(DOCUMENTS).tolist() == [
        [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4],
    ]


def test_each_document_gets_the_logits_that_it_gets_alone(mesh: Mesh) -> None:
    (model,) = build_model(small_config(model=LIVELY, data={"packing": "documents"}), mesh)
    zt_BS = torch.arange(24).view(2, 12) * 7 % 44
    with torch.no_grad():
        logits_SBP = model(zt_BS, DOCUMENTS)
        together = model(zt_BS)
        for row in range(2):
            for span in pieces(DOCUMENTS[row]):
                alone = model(zt_BS[row : row + 1, span])[:, 0]
                torch.testing.assert_close(logits_SBP[span, row], alone, rtol=1e-5, atol=1e-5)
                assert (together[span, row] - alone).abs().max() > 1e-2


@pytest.mark.parametrize("fuse_head", ["never", "always"])
@pytest.mark.parametrize("uniform_ratio", [0.0, 0.1])
def test_loss_and_gradient_are_sums_over_documents(uniform_ratio: float, fuse_head: str, mesh: Mesh) -> None:
    """Each at its own time; padding adds nothing, whatever it holds."""
    config = small_config(model=LIVELY, data={"packing": "documents"})
    (model,) = build_model(config, mesh)
    noise = StationaryNoise(uniform_ratio, 45, 44)
    objective = Objective(noise, mesh, fuse_head=fuse_head)
    generator = torch.Generator().manual_seed(0)
    x0_BS = torch.randint(44, (2, 12), generator=generator)
    t_BS = torch.where(DOCUMENTS == 1, 0.8, torch.where(DOCUMENTS == 2, 0.4, 0.55)).double()
    scored_BS = DOCUMENTS != PADDING
    zt_BS = noise.corrupt(x0_BS, 1 - t_BS, (1, 1), (torch.arange(2)[:, None], torch.arange(12)))
    zt_BS = torch.where(scored_BS, zt_BS, x0_BS)
    dalpha_BS = torch.where(scored_BS, -1.0, 0.0).double()
    rates = (t_BS, 1 - t_BS, t_BS, dalpha_BS)

    def loss_of(batch: Batch) -> tuple[torch.Tensor, int, list[torch.Tensor]]:
        model.zero_grad()
        output, loss_function = objective.forward_step(iter([batch]), model)
        loss, count, _ = loss_function(output)
        loss.backward()
        return loss.detach(), int(count), [p.grad.clone() for p in model.parameters()]

    loss, count, gradients = loss_of(Batch(x0_BS, zt_BS, *rates, scored_BS, DOCUMENTS))
    assert count == 12 + 7
    alone = []
    for row in range(2):
        for span in pieces(DOCUMENTS[row]):
            fields = [x[row : row + 1, span] for x in (x0_BS, zt_BS, *rates, scored_BS)]
            alone.append(loss_of(Batch(*fields)))
    assert len(alone) == 4
    torch.testing.assert_close(loss, sum(one[0] for one in alone), rtol=1e-5, atol=0)
    assert count == sum(one[1] for one in alone)
    for index, gradient in enumerate(gradients):
        expected = sum(one[2][index] for one in alone)
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()
