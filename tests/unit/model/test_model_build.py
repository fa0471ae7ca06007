"""From recipe to model: sizes, passed-through fields, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.model.small import small_config
from xdlm_megatron.config.derive import derive
from xdlm_megatron.model.build import build_model, unwrap, wrap_for_training
from xdlm_megatron.model.transformer_config import build_transformer_config
from xdlm_megatron.optim.build import build_optimizer
from xdlm_megatron.parallel.mesh import Mesh

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha, deeper": {"model": {"num_query_groups": None, "num_layers": 5}},
    "tied": {"model": {"share_embeddings_and_output_weights": True}},
    "no norm on q and k": {"model": {"qk_layernorm": False}},
    "wide heads": {"model": {"kv_channels": 18}},
    "one group, odd ffn": {"model": {"num_query_groups": 1, "ffn_hidden_size": 31}},
    "much padding": {"data": {"vocab_size": 130, "mask_id": 7, "make_vocab_size_divisible_by": 128}},
    "no padding": {"data": {"vocab_size": 64, "mask_id": 0}},
}


@pytest.mark.parametrize("sections", SHAPES.values(), ids=SHAPES)
def test_number_of_parameters_is_the_derived_one(sections: dict, mesh: Mesh) -> None:
    config = small_config(**sections)
    (model,) = build_model(config, mesh)
    derived = derive(config, 1)
    count = sum(p.numel() for p in model.parameters())
    assert count == derived.num_parameters
    tables = [model.embedding.word_embeddings.weight]
    if not config.model.share_embeddings_and_output_weights:
        tables.append(model.output_layer.weight)
    assert derived.num_non_embedding_parameters == count - sum(p.numel() for p in tables)
    assert all(p.shape[0] == derived.padded_vocab_size for p in tables)


def test_an_unknown_mcore_field_is_refused_with_a_guess() -> None:
    config = small_config(model={"mcore": {"apply_residual_connection_post_layernrm": True}})
    with pytest.raises(ValueError, match="did you mean 'apply_residual_connection_post_layernorm'"):
        build_transformer_config(config.model, config.parallel, config.precision)


def test_a_known_mcore_field_arrives_and_changes_the_model(mesh: Mesh) -> None:
    plain, offset = (
        build_model(small_config(model={"zero_init_head": False, "mcore": fields}), mesh)[0]
        for fields in ({}, {"glu_linear_offset": 1.0})
    )
    assert offset.config.glu_linear_offset == 1.0
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert (plain(tokens) - offset(tokens)).abs().max() > 1e-3


def test_a_value_that_megatron_refuses_names_the_cure() -> None:
    config = small_config(model={"mcore": {"recompute_granularity": "everything"}})
    with pytest.raises(
        ValueError, match=r"megatron-core refuses this transformer: .*change the field it names"
    ):
        build_transformer_config(config.model, config.parallel, config.precision)


def test_bfloat16_trains_with_logits_in_bfloat16(mesh: Mesh) -> None:
    config = small_config(precision={"dtype": "bfloat16"}, model={"zero_init_head": False})
    bare = build_model(config, mesh)
    (chunk,) = wrap_for_training(bare, True, mesh)
    optimizer = build_optimizer(config.optimizer, config.lr_schedule, [chunk], mesh)
    model = unwrap(chunk)
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    logits = chunk(torch.arange(24).view(2, 12))
    assert logits.dtype is torch.bfloat16, "a float32 copy would be the largest tensor of the step"
    logits.float().square().sum().backward()
    assert all(p.main_grad.dtype is torch.float32 for p in model.parameters())
    chunk.finish_grad_sync()
    successful, grad_norm, _ = optimizer.step()
    assert successful
    assert grad_norm > 0
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert set(moved) >= {name for name, p in before.items() if p.dim() == 2}


def test_bfloat16_starts_from_the_rounded_float32_weights(mesh: Mesh) -> None:
    (full,) = build_model(small_config(), mesh)
    (half,) = build_model(small_config(precision={"dtype": "bfloat16"}), mesh)
    rounded = dict(unwrap(half).named_parameters())
    for name, p in full.named_parameters():
        assert torch.equal(rounded[name], p.bfloat16()), name
