"""DiffusionLM against a transformer written in plain torch, float64, fed with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.model.small import small_config
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.model.build import build_model
from xdlm_megatron.model.layer_spec import RMSNorm
from xdlm_megatron.model.transformer_config import build_transformer_config
from xdlm_megatron.parallel.mesh import Mesh


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x_BSND: Tensor, base: float) -> Tensor:
    """RoPE: the pair (i, i + D/2) of a head turns by position * base^(-2i/D)."""
    S, D = x_BSND.shape[1], x_BSND.shape[3]
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(S, dtype=torch.float64)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None, :]
    pairs = torch.complex(x_BSND[..., : D // 2], x_BSND[..., D // 2 :]) * turn
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def reference(config: RunConfig, weights: dict[str, Tensor], zt_BS: Tensor) -> Tensor:
    """Logits [B, S, V]."""
    model, eps = config.model, config.model.layernorm_epsilon
    N, G = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    D = model.kv_channels or model.hidden_size // N
    B, S = zt_BS.shape
    x = weights["embedding.word_embeddings.weight"][zt_BS]
    for layer in range(model.num_layers):
        w = {k.removeprefix(f"decoder.layers.{layer}."): v for k, v in weights.items()}
        h = rms_norm(x, w["input_layernorm.weight"], eps)
        # Rows of linear_qkv: for each group its N/G queries, its key, its value.
        rows = w["self_attention.linear_qkv.weight"].view(G, N // G + 2, D, -1)
        q = torch.einsum("bsh,gndh->bsgnd", h, rows[:, :-2]).reshape(B, S, N, D)
        k = torch.einsum("bsh,gdh->bsgd", h, rows[:, -2])
        v = torch.einsum("bsh,gdh->bsgd", h, rows[:, -1])
        if model.qk_layernorm:
            q = rms_norm(q, w["self_attention.q_layernorm.weight"], eps)
            k = rms_norm(k, w["self_attention.k_layernorm.weight"], eps)
        q, k = rotate(q, model.rotary_base), rotate(k, model.rotary_base)
        k, v = k.repeat_interleave(N // G, dim=2), v.repeat_interleave(N // G, dim=2)
        scores = torch.einsum("bsnd,btnd->bnst", q, k) / D**0.5
        mixed = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v).reshape(B, S, N * D)
        x = x + mixed @ w["self_attention.linear_proj.weight"].T
        h = rms_norm(x, w["pre_mlp_layernorm.weight"], eps)
        gate, up = (h @ w["mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w["mlp.linear_fc2.weight"].T
    x = rms_norm(x, weights["decoder.final_layernorm.weight"], eps)
    tied = model.share_embeddings_and_output_weights
    head = weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"]
    return x @ head.T


SHAPES = {
    "gqa": {},
    "mha": {"num_query_groups": None},
    "one group": {"num_query_groups": 1},
    "plain": {"qk_layernorm": False},
    "wide heads": {"kv_channels": 12, "rotary_base": 500, "layernorm_epsilon": 1e-2},
    "tied": {"share_embeddings_and_output_weights": True},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_equals_the_reference(shape: dict, mesh: Mesh) -> None:
    config = small_config(model=shape)
    (model,) = build_model(config, mesh)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Large enough that attention is far from uniform and every norm matters.
        fresh = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data.copy_(fresh + (1.0 if parameter.dim() == 1 else 0.0))
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    zt_BS = torch.randint(45, (3, 12), generator=generator)
    with torch.no_grad():
        logits_BSV = model(zt_BS).transpose(0, 1).double()
    expected_BSV = reference(config, weights, zt_BS)
    assert expected_BSV.std() > 0.5
    torch.testing.assert_close(logits_BSV, expected_BSV, rtol=1e-5, atol=3e-5)


def test_rms_norm_against_the_formula() -> None:
    config = small_config()
    transformer = build_transformer_config(config.model, config.parallel, config.precision)
    norm = RMSNorm(transformer, 8, eps=0.1).double()
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(8, generator=generator, dtype=torch.float64)
    x = torch.randn(5, 3, 8, generator=generator, dtype=torch.float64)
    for row, out in zip(x.view(-1, 8), norm(x).detach().view(-1, 8), strict=True):
        root = (sum(float(v) ** 2 for v in row) / 8 + 0.1) ** 0.5
        expected = [float(v) / root * float(w) for v, w in zip(row, norm.weight.detach(), strict=True)]
        assert out.tolist() == pytest.approx(expected, rel=1e-12)
