"""The objective with the head in the loss against the objective with logits, through whole models."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.model.small import small_config
from tests.unit.model.test_objective import noisy_batch
from xdlm_megatron.diffusion import head_nelbo
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.model.build import build_model, unwrap, wrap_for_training
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh


def loss_and_gradients(objective: Objective, model, batch, scale: float = 1.0) -> tuple:
    output, loss_function = objective.forward_step(iter([batch]), model)
    loss, count, report = loss_function(output)
    gradients = torch.autograd.grad(loss * scale, list(unwrap(model).parameters()))
    return loss.detach(), count, report["nelbo_per_sequence"], gradients


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("uniform_ratio", [0.0, 0.1, 1.0])
def test_same_loss_and_gradients(uniform_ratio: float, dtype: str, tied: bool, mesh: Mesh) -> None:
    options = {"zero_init_head": False, "init_method_std": 0.2, "share_embeddings_and_output_weights": tied}
    (model,) = build_model(small_config(model=options, precision={"dtype": dtype}), mesh)
    noise = StationaryNoise(uniform_ratio, 45, 44)
    batch = noisy_batch(noise)
    plain, fused = (Objective(noise, mesh, fuse_head=flag) for flag in ("never", "always"))
    # In bfloat16 both round the gradient of the logits once, at different scales, and then go a long way.
    tolerance = 1e-5 if dtype == "float32" else 4e-2
    for scale in (1.0, 1 / 3):
        want, want_count, want_report, want_gradients = loss_and_gradients(plain, model, batch, scale)
        loss, count, report, gradients = loss_and_gradients(fused, model, batch, scale)
        assert count == want_count
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        torch.testing.assert_close(report, want_report, rtol=1e-5, atol=1e-4)
        for mine, theirs in zip(gradients, want_gradients, strict=True):
            assert mine.dtype == theirs.dtype
            assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_megatron_accumulates_each_gradient_once(tied: bool, mesh: Mesh) -> None:
    """Two micro-batches through the data-parallel wrapper sum up in main_grad; .grad is left empty."""
    noise = StationaryNoise(0.1, 45, 44)
    batch = noisy_batch(noise)
    options = {"zero_init_head": False, "share_embeddings_and_output_weights": tied}
    sums = []
    for fuse_head in ("never", "always"):
        (model,) = wrap_for_training(build_model(small_config(model=options), mesh), False, mesh)
        model.zero_grad_buffer()
        for _ in range(2):
            output, loss_function = Objective(noise, mesh, fuse_head=fuse_head).forward_step(
                iter([batch]), model
            )
            loss_function(output)[0].backward()
        assert all(p.grad is None for p in model.parameters())
        sums.append([p.main_grad.clone() for p in model.parameters()])
    for plain, fused in zip(*sums, strict=True):
        assert (fused - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize(
    ("uniform_ratio", "chunk", "fuses"), [(0.1, 1 << 20, False), (0.1, 1, True), (0.0, 1 << 20, True)]
)
def test_auto_fuses_where_there_is_something_to_save(
    uniform_ratio: float, chunk: int, fuses: bool, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_nelbo.CHUNK_ELEMENTS, "cpu", chunk)
    (model,) = build_model(small_config(), mesh)
    noise = StationaryNoise(uniform_ratio, 45, 44)
    output, _ = Objective(noise, mesh).forward_step(iter([noisy_batch(noise)]), model)
    assert output.shape[-1] == (32 if fuses else 48), "hidden states, or logits"


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of a tensor that an operator returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("training", [True, False])
def test_the_logits_never_exist(training: bool, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab_size = 3 * 12, 4045
    monkeypatch.setitem(head_nelbo.CHUNK_ELEMENTS, "cpu", 8 * 4048)
    (model,) = build_model(small_config(data={"vocab_size": vocab_size}, model={"hidden_size": 8}), mesh)
    noise = StationaryNoise(0.1, vocab_size, 44)
    largest = []
    for fuse_head in ("always", "never"):
        with LargestTensor() as seen, torch.set_grad_enabled(training):
            objective = Objective(noise, mesh, fuse_head=fuse_head)
            output, loss_function = objective.forward_step(iter([noisy_batch(noise)]), model)
            loss, *_ = loss_function(output)
            if training:
                loss.backward()
        largest.append(seen.largest)
    assert largest[0] <= 3 * tokens * vocab_size / 4, (
        "8 of 36 tokens at once, and the loss's two scratch rows"
    )
    assert largest[1] >= tokens * vocab_size, "the check must see logits where they are"
