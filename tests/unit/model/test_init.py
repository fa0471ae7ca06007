"""Initial weights: what they are, and that a slice of them does not depend on who holds it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from tests.unit.model.small import small_config
from xdlm_megatron.diffusion.nelbo import nelbo_density
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.model import init
from xdlm_megatron.model.build import build_model
from xdlm_megatron.model.dlm import DiffusionLM
from xdlm_megatron.model.init import init_weights
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh

BIG = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "zero_init_head": False}


def build(mesh: Mesh, seed: int = 3, **model: Any) -> DiffusionLM:
    (chunk,) = build_model(small_config(run={"seed": seed}, model=model), mesh)
    return chunk


def test_weights_are_a_function_of_seed_name_and_layer(mesh: Mesh) -> None:
    first, again, other = (dict(build(mesh, seed, **BIG).named_parameters()) for seed in (3, 3, 4))
    matrices = [name for name, p in first.items() if p.dim() == 2]
    assert len(matrices) == 2 + 4 * 3
    for name in first:
        assert torch.equal(first[name], again[name])
    for name in matrices:
        assert not torch.equal(first[name], other[name])
    # No two matrices repeat one another: neither two layers nor two names of one shape.
    starts = {tuple(first[name].view(-1)[:8].tolist()) for name in matrices}
    assert len(starts) == len(matrices)


def test_a_deeper_model_shares_its_first_layers(mesh: Mesh) -> None:
    """Only the residual outputs know the depth, by their scale."""
    shallow, deep = (dict(build(mesh, **{**BIG, "num_layers": n}).named_parameters()) for n in (2, 3))
    for name in shallow:
        scale = math.sqrt(3 / 2) if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1.0
        torch.testing.assert_close(deep[name] * scale, shallow[name], rtol=1e-6, atol=0)


def test_standard_deviations(mesh: Mesh) -> None:
    for name, p in build(mesh, **BIG, init_method_std=0.05).named_parameters():
        p = p.detach()
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        rows = p[:45] if "embedding" in name or "output_layer" in name else p
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.05 / math.sqrt(2 * 3) if residual else 0.05
        count = rows.numel()
        assert rows.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * count)), name
        assert abs(rows.mean().item()) < 5 * expected / math.sqrt(count), name


def test_padded_rows_are_zero_and_real_ones_are_not(mesh: Mesh) -> None:
    model = build(mesh, **BIG)
    for weight in (model.embedding.word_embeddings.weight, model.output_layer.weight):
        assert weight.shape[0] == 48
        assert (weight[45:] == 0).all()
        assert (weight[:45] != 0).any(dim=1).all()


def test_zero_head_is_the_uniform_predictor(mesh: Mesh) -> None:
    """Its loss is that of equal logits; under mask noise that is log(V - 1) a masked token and unit of t."""
    model = build(mesh)
    noise = StationaryNoise(0.1, 45, 44)
    x0_BS = torch.arange(24).view(2, 12)
    zt_BS = torch.where(torch.arange(12) % 3 == 0, 44, (x0_BS + torch.arange(12) % 3 // 2) % 44)
    alpha_B = torch.tensor([0.3, 0.9], dtype=torch.float64)
    rates = (alpha_B, 1 - alpha_B, torch.full_like(alpha_B, -0.999))
    with torch.no_grad():
        logits_SBP = model(zt_BS)
    assert (logits_SBP == 0).all()
    assert not torch.equal(zt_BS, x0_BS)
    batch = type("Batch", (), dict(zip(("alpha_BS", "beta_BS", "dalpha_BS"), rates, strict=True)))
    batch.x0_BS, batch.zt_BS = x0_BS, zt_BS
    expected = nelbo_density(torch.zeros(2, 12, 45, dtype=torch.float64), zt_BS, x0_BS, *rates, noise)
    got = Objective(noise, mesh).nelbo(logits_SBP, batch)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)

    mask_noise = Objective(StationaryNoise(0.0, 45, 44), mesh)
    weight_B = 0.999 / (1 - alpha_B)
    expected = torch.where(zt_BS == 44, weight_B[:, None] * math.log(44), 0.0)
    torch.testing.assert_close(mask_noise.nelbo(logits_SBP, batch).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_zero_head_is_only_the_head(tied: bool, mesh: Mesh) -> None:
    model = build(mesh, share_embeddings_and_output_weights=tied)
    zero = [name for name, p in model.named_parameters() if (p == 0).all()]
    assert zero == ([] if tied else ["output_layer.weight"])


class Half:
    """What `init_weights` sees of a model on rank `rank` of two tensor-parallel processes.

    Megatron's rule: qkv, fc1, embedding and head are split along rows, the two that write to the residual
    stream along columns; fc1 holds its half of the gate above its half of the up projection.
    """

    def __init__(self, model: DiffusionLM, rank: int) -> None:
        self.config = model.config
        self.rank = rank
        self.shards: dict[str, torch.Tensor] = {}
        self.model = model

    def sharded_state_dict(self) -> dict[str, Any]:
        state = {}
        for name, p in self.model.named_parameters():
            axis = None
            if p.dim() == 2:
                axis = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
            shape = [n // 2 if i == axis else n for i, n in enumerate(p.shape)]
            self.shards[name] = torch.full(shape, torch.nan)
            key, offsets = name, []
            if name.startswith("decoder.layers."):
                layer, key = name.removeprefix("decoder.layers.").split(".", 1)
                key = f"decoder.layers.{key}"
                offsets = [(0, int(layer), self.config.num_layers)]
            leading = len(offsets)
            if axis is not None:
                offsets.append((leading + axis, self.rank, 2))
            sharded = ShardedTensor.from_rank_offsets(
                key, self.shards[name], *offsets, prepend_axis_num=leading, allow_shape_mismatch=False
            )
            if name.endswith("linear_fc1.weight"):
                sharded = apply_swiglu_sharded_factory(sharded, (((0, int(layer), self.config.num_layers)),))
            state[name] = sharded
        return state


@pytest.mark.parametrize("rank", [0, 1])
def test_half_of_a_tensor_parallel_pair_holds_its_slice(rank: int, mesh: Mesh) -> None:
    model = build(mesh, **BIG)
    half = Half(model, rank)
    init_weights(half, seed=3, vocab_size=45, zero_head=False)

    def mine(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(2, dim=dim)[rank]

    for name, whole in model.named_parameters():
        whole = whole.detach()
        if whole.dim() == 1:
            expected = whole
        elif name.endswith("linear_fc1.weight"):
            gate, up = whole.chunk(2)
            expected = torch.cat([mine(gate, 0), mine(up, 0)])
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            expected = mine(whole, 1)
        else:
            expected = mine(whole, 0)
        assert torch.equal(half.shards[name], expected), name


class Quantized(torch.Tensor):
    """Stands for a weight in FP8: values are halves of its own, and a part of it is no view of it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.Tensor.copy_:
                return args[0].copy_(args[1].half())
            out = function(*args, **kwargs)
            return tuple(part.clone() for part in out) if "chunk" in function.__name__ else out


def test_weights_in_fp8_and_what_their_master_weights_begin_with(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = dict(build(mesh, **BIG).named_parameters())
    model = build(mesh, **BIG)
    before_rounding = {}
    for layer in model.decoder.layers:
        for module in (layer.self_attention.linear_qkv, layer.mlp.linear_fc1):
            weight = torch.zeros_like(module.weight.detach()).as_subclass(Quantized)
            drawn = torch.full(weight.shape, torch.nan)  # upstream's draw, which must not survive
            weight.get_high_precision_init_val = lambda drawn=drawn: drawn
            module._parameters["weight"] = weight
            before_rounding[id(weight)] = drawn
    monkeypatch.setattr(init, "is_float8tensor", lambda value: isinstance(value, Quantized))
    init_weights(model, seed=3, vocab_size=45, zero_head=False)
    for name, parameter in model.named_parameters():
        in_fp8 = id(parameter) in before_rounding
        expected = wanted[name].half().float() if in_fp8 else wanted[name]
        assert torch.equal(parameter.detach().as_subclass(torch.Tensor), expected), name
        if in_fp8:
            assert torch.equal(before_rounding[id(parameter)], wanted[name]), name
    assert len(before_rounding) == 6
