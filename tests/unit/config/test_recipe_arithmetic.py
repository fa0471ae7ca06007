"""The figures of derive.py against counts by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xdlm_megatron.config.derive import (
    data_parallel_size,
    derive,
    flops_per_token,
    num_parameters,
    padded_vocab_size,
    run_folder,
)
from xdlm_megatron.config.load import build_config
from xdlm_megatron.config.schema import RunConfig

Build = Callable[..., RunConfig]


@pytest.fixture
def build(changed: Callable[[dict[str, Any]], dict[str, Any]]) -> Build:
    """build(section__field=value, ...) -> RunConfig."""
    return lambda **changes: build_config(changed({k.replace("__", "."): v for k, v in changes.items()}))


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "tensor", "padded"),
    [
        (100, 128, 1, 128),
        (128, 128, 1, 128),
        (129, 128, 1, 256),
        (129, 128, 2, 256),
        (300, 128, 4, 512),
        (7, 1, 1, 7),
    ],
)
def test_padded_vocabulary(
    build: Build, vocab_size: int, divisible_by: int, tensor: int, padded: int
) -> None:
    config = build(
        data__vocab_size=vocab_size,
        data__make_vocab_size_divisible_by=divisible_by,
        parallel__tensor_model_parallel_size=tensor,
    )
    assert padded_vocab_size(config) == padded
    assert padded % tensor == 0


def weights(config: RunConfig, groups: int, head: int, padded: int) -> dict[str, tuple[int, ...]]:
    """Every weight of the model by name, with its shape, as one would write the model down."""
    model = config.model
    heads, hidden, inner = model.num_attention_heads, model.hidden_size, model.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding": (padded, hidden), "final_norm": (hidden,)}
    if not model.share_embeddings_and_output_weights:
        shapes["head"] = (padded, hidden)
    for i in range(model.num_layers):
        shapes |= {
            f"{i}.attention_norm": (hidden,),
            f"{i}.query": (heads * head, hidden),
            f"{i}.key": (groups * head, hidden),
            f"{i}.value": (groups * head, hidden),
            f"{i}.projection": (hidden, heads * head),
            f"{i}.mlp_norm": (hidden,),
            f"{i}.gate": (inner, hidden),
            f"{i}.up": (inner, hidden),
            f"{i}.down": (hidden, inner),
        }
        if model.qk_layernorm:
            shapes |= {f"{i}.query_norm": (head,), f"{i}.key_norm": (head,)}
    return shapes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_layernorm", [False, True])
@pytest.mark.parametrize(("groups", "head"), [(None, None), (2, None), (1, 6), (4, 16)])
def test_parameters(
    build: Build, tied: bool, qk_layernorm: bool, groups: int | None, head: int | None
) -> None:
    config = build(
        model__num_query_groups=groups,
        model__kv_channels=head,
        model__qk_layernorm=qk_layernorm,
        model__share_embeddings_and_output_weights=tied,
    )
    shapes = weights(config, groups or 4, head or 8, 128)
    assert num_parameters(config) == sum(math.prod(shape) for shape in shapes.values())
    derived = derive(config, 1)
    outside = sum(math.prod(shape) for name, shape in shapes.items() if name in ("embedding", "head"))
    assert derived.num_non_embedding_parameters == derived.num_parameters - outside
    assert derived.weight_bytes == 4 * derived.num_parameters


def test_flops_per_token_by_hand(build: Build) -> None:
    """Forward: 2 per weight of a matrix, 2 S d for each of the scores and the mixing; backward twice that.

    Weights of a layer: query 32 * 24, key and value 32 * 12 each, projection 24 * 32, MLP 3 * 32 * 64.
    """
    config = build(model__num_query_groups=2, model__kv_channels=6, model__num_layers=3)
    layer = 32 * 24 + 2 * 32 * 12 + 24 * 32 + 3 * 32 * 64
    assert layer == 8448
    forward = 3 * (2 * layer + 2 * 2 * 16 * 24) + 2 * 100 * 32
    assert flops_per_token(config) == 3 * forward == 185_088


def test_batch_arithmetic(build: Build) -> None:
    config = build(
        train__global_batch_size=48,
        parallel__tensor_model_parallel_size=2,
        parallel__pipeline_model_parallel_size=2,
    )
    derived = derive(config, 16)
    assert derived.data_parallel_size == 4
    assert derived.num_microbatches == 6
    assert derived.tokens_per_step == 48 * 16
    assert derived.total_tokens == 48 * 16 * 20
    assert (derived.num_query_groups, derived.kv_channels) == (4, 8)


def test_a_batch_that_does_not_divide(build: Build) -> None:
    config = build(train__global_batch_size=100, train__micro_batch_size=4)
    with pytest.raises(ValueError, match="nearest") as caught:
        derive(config, 8)
    assert str(caught.value) == (
        "train.global_batch_size=100 must be a multiple of micro_batch_size * data_parallel_size = "
        "4 * 8 = 32; nearest: 96 or 128"
    )
    for nearest in (96, 128):
        assert derive(build(train__global_batch_size=nearest), 8).num_microbatches == nearest // 32
    with pytest.raises(ValueError, match=r"= 4 \* 64 = 256; nearest: 256$"):
        derive(build(train__global_batch_size=100), 64)


def test_interleaving_needs_micro_batches_in_multiples_of_the_stages(build: Build) -> None:
    config = build(
        train__global_batch_size=6,
        parallel__pipeline_model_parallel_size=2,
        parallel__virtual_pipeline_model_parallel_size=2,
    )
    with pytest.raises(
        ValueError, match=r"\(3\) in multiples of pipeline_model_parallel_size=2; .*global_batch_size"
    ):
        derive(config, 2)
    assert derive(build(train__global_batch_size=8), 2).num_microbatches == 4


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "context", "replicas"),
    [(1, 1, 1, 1, 1), (8, 2, 2, 1, 2), (6, 3, 1, 1, 2), (12, 1, 2, 3, 2)],
)
def test_replicas(world: int, tensor: int, pipeline: int, context: int, replicas: int) -> None:
    assert data_parallel_size(world, tensor, pipeline, context) == replicas


@pytest.mark.parametrize("world", [-12, 0, 1, 4, 18])
def test_a_world_that_does_not_fit(world: int) -> None:
    message = (
        f"world size {world} must be a multiple of parallel.tensor_model_parallel_size * "
        "parallel.pipeline_model_parallel_size * parallel.context_parallel_size = 2 * 2 * 3 = 12; "
        "start 12 or 24 processes"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        data_parallel_size(world, 2, 2, 3)


def test_run_folder(build: Build) -> None:
    assert run_folder(build(run__output_dir="here")) == Path("here/small")
