"""The planner's bytes against tensors of real models, rank by rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.optimizer import ChainedOptimizer

from tests.unit.launch.ranks import FULL, MLP, rank_of, recipe, run_forward, saved_bytes
from tests.unit.model.small import small_config
from xdlm_megatron.config.derive import num_parameters
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.diffusion.head_nelbo import CHUNK_ELEMENTS, fusing_pays
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo
from xdlm_megatron.launch.layout import Layout, Shape, recipe_layout
from xdlm_megatron.launch.memory import (
    AVERAGE,
    MOMENTS,
    head_bytes,
    layer_activations,
    rank_parameters,
    stage_activations,
    stage_memory,
)
from xdlm_megatron.model.build import build_model, wrap_for_training
from xdlm_megatron.optim.build import build_optimizer
from xdlm_megatron.optim.ema import Ema

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"tensor_model_parallel_size": 2}),
    (4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    (8, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
    (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
]


# Parameters, and what is kept for each of them


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"num_query_groups": 2},
        {"share_embeddings_and_output_weights": True},
        {"qk_layernorm": False},
        {"kv_channels": 10, "num_query_groups": 2, "ffn_hidden_size": 40},
    ],
)
@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_parameters_of_every_rank(world: int, parallel: dict[str, Any], model: dict[str, Any]) -> None:
    config = small_config(parallel=parallel, model={"num_layers": 4} | model)
    layout, shape = recipe_layout(config, world), Shape.of(config)
    for stage in range(layout.pp):
        with rank_of(config, stage * world // layout.pp, world) as mesh:
            built = sum(p.numel() for chunk in build_model(config, mesh) for p in chunk.parameters())
        assert rank_parameters(shape, layout, stage) == built
    if world == 1:
        assert rank_parameters(shape, layout, 0) == num_parameters(config)


@pytest.mark.parametrize("vocab_size", [45, 48, 49])
def test_parameters_of_a_padded_vocabulary(vocab_size: int) -> None:
    parallel = {"tensor_model_parallel_size": 2}
    config = small_config(parallel=parallel, data={"vocab_size": vocab_size, "mask_id": 44})
    with rank_of(config, 1, 2) as mesh:
        built = sum(p.numel() for p in build_model(config, mesh)[0].parameters())
    assert rank_parameters(Shape.of(config), recipe_layout(config, 2), 0) == built


def state_bytes(config: RunConfig, rank: int, world: int) -> dict[str, int]:
    """Bytes on one rank after an optimizer step. Buffers are padded, so parameters are summed one by one."""
    with rank_of(config, rank, world) as mesh:
        chunks = wrap_for_training(
            build_model(config, mesh), config.optimizer.use_distributed_optimizer, mesh
        )
        optimizer = build_optimizer(config.optimizer, config.lr_schedule, chunks, mesh)
        ema = Ema(chunks, optimizer, 0.999, mesh)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        for parameter in parameters:
            parameter.main_grad.zero_()
        optimizer.step()
        inner = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
        weights = {p.untyped_storage().data_ptr() for p in parameters}
        found = {"main": 0, "moments": 0}
        for one in inner:
            for main in (p for group in one.optimizer.param_groups for p in group["params"]):
                if main.untyped_storage().data_ptr() not in weights:
                    found["main"] += main.nbytes
                state = one.optimizer.state[main]
                found["moments"] += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
        found["weights"] = sum(p.nbytes for p in parameters)
        found["gradients"] = sum(p.main_grad.nbytes for p in parameters)
        found["ema"] = sum(shard.average.nbytes for shard in ema._shards.values())
        return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_training_state_of_the_ranks_that_share_it(dtype: str, distributed: bool) -> None:
    """Two data-parallel ranks of a first stage: shards differ in size, their sum does not."""
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    config = small_config(
        parallel=parallel,
        precision={"dtype": dtype},
        optimizer={"use_distributed_optimizer": distributed},
        model={"num_layers": 4},
    )
    ranks = [state_bytes(config, rank, world=8) for rank in (0, 2)]
    layout, shape = recipe_layout(config, 8), Shape.of(config)
    assert layout.dp == 2
    parameters = rank_parameters(shape, layout, 0)
    memory = stage_memory(shape, layout)
    shards = 2 if distributed else 1
    for found in ranks:
        assert found["weights"] == parameters * shape.bytes
        assert found["gradients"] == parameters * 4
    main = parameters * 4 if dtype == "bfloat16" else 0
    copies = 1 if distributed else 2
    assert sum(found["main"] for found in ranks) == main * copies
    assert sum(found["moments"] for found in ranks) == parameters * MOMENTS * copies
    assert sum(found["ema"] for found in ranks) == parameters * AVERAGE * copies
    larger = max(rank_parameters(shape, layout, stage) for stage in (0, 1))
    assert memory.optimizer == pytest.approx((main / parameters + MOMENTS) * larger / shards)
    assert memory.ema == pytest.approx(AVERAGE * larger / shards)


# Activations


def kept_by_layers(num_layers: int, dtype: str, world: int, sections: dict[str, Any]) -> int:
    config = recipe(num_layers, dtype, **sections)
    with rank_of(config, 0, world) as mesh:
        chunks: list[Any] = []
        return saved_bytes(
            lambda: chunks.append(run_forward(config, mesh)[0]),
            lambda: {p.untyped_storage().data_ptr() for p in chunks[0].parameters()},
        )


TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("world", "sections"),
    [
        (1, {}),
        (1, {"model": {"qk_layernorm": False}}),
        (1, {"model": {"num_query_groups": 4}}),
        (1, {"model": {"hidden_dropout": 0.1}}),
        (1, {"train": {"micro_batch_size": 1}}),
        (1, {"data": {"packing": "documents"}}),
        (1, {"model": {"mcore": MLP}}),
        (1, {"model": {"mcore": FULL}}),
        (2, {"parallel": TP}),
        (2, {"parallel": SP}),
        (2, {"parallel": SP, "model": {"mcore": FULL}}),
        (2, {"parallel": SP, "model": {"mcore": MLP}}),
        (2, {"parallel": {"context_parallel_size": 2}}),
        (4, {"parallel": SP | {"context_parallel_size": 2}}),
    ],
)
def test_what_a_layer_keeps_for_backward(dtype: str, world: int, sections: dict[str, Any]) -> None:
    measured = kept_by_layers(3, dtype, world, sections) - kept_by_layers(2, dtype, world, sections)
    config = recipe(2, dtype, **sections)
    layout = recipe_layout(config, world)
    assert layer_activations(Shape.of(config), layout, fused_norms=False) == measured


def test_fused_norms_keep_their_input_and_a_number_a_row() -> None:
    """CUDA has RMSNorm as one kernel, which this machine cannot run: the difference, by hand."""
    config = recipe(2, "bfloat16", model={"num_query_groups": 4})
    shape, layout = Shape.of(config), recipe_layout(config, 1)
    composite, fused = (layer_activations(shape, layout, fused_norms=f) for f in (False, True))
    t, width, heads = 32, 40, 24
    # of a residual norm two float32 copies, or its input; of q's and k's two float32 copies, or views
    assert composite - fused == t * (2 * width * (8 - 2) + 2 * heads * 8)


@pytest.mark.parametrize(
    ("layout", "stage", "layers"),
    [
        (Layout(1), 0, 8),  # one micro-batch at a time
        (Layout(4, pp=4), 0, 4 * 2),  # 1F1B: four in flight on the first stage, one on the last
        (Layout(4, pp=4), 3, 1 * 2),
        (Layout(2, pp=2, micro_batch=8), 0, 1 * 4),  # only one micro-batch a step
        # interleaved, 2 stages of 4 chunks of one layer: 2 (2 - 0 - 1) + (4 - 1) 2 + 1 = 9 chunks
        (Layout(2, pp=2, vpp=4), 0, 9),
        (Layout(2, pp=2, vpp=4), 1, 7),
    ],
)
def test_micro_batches_in_flight(layout: Layout, stage: int, layers: int) -> None:
    shape = Shape.of(recipe(8, "bfloat16", train={"micro_batch_size": 1, "global_batch_size": 8}))
    kept = stage_activations(shape, layout, stage) - (
        0 if layout.pp == 1 else layers / (8 // layout.pp // layout.vpp) * layout.tokens(shape) * 40 * 2
    )
    assert kept == pytest.approx(layers * layer_activations(shape, layout))


# Head and loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, TP), (2, SP)])
def test_what_head_and_loss_keep(dtype: str, world: int, parallel: dict[str, Any]) -> None:
    """Logits, the head's input and the loss's terms; the final norm's input is bound to what norms keep."""
    config = recipe(1, dtype, parallel=parallel, train={"fuse_head": "never"})
    noise = StationaryNoise(0.5, 45, 44)

    def kept(with_head: bool) -> int:
        with rank_of(config, 0, world) as mesh:
            chunks: list[Any] = []

            def forward() -> None:
                chunk, output = run_forward(config, mesh, without_head=not with_head)
                chunks.append(chunk)
                if with_head:
                    x0_BS, rate = torch.zeros(2, 16, dtype=torch.long), torch.full((2, 16), 0.5)
                    group = mesh.groups.tp if world > 1 else None
                    vocab_parallel_nelbo(
                        output.transpose(0, 1), x0_BS, x0_BS, rate, rate, -rate, noise, group=group
                    )

            return saved_bytes(
                forward, lambda: {p.untyped_storage().data_ptr() for p in chunks[0].parameters()}
            )

    shape, layout = Shape.of(config), recipe_layout(config, world)
    t, e = 32, shape.bytes
    measured = kept(True) - kept(False)
    head_input = t * 40 * e / layout.sequence_slices
    logits = t * (48 if world == 1 else 64) // world * e
    assert measured == head_input + logits + 6 * 4 * t
    model = head_bytes(shape, layout) - t * 40 * e / layout.sequence_slices  # less the norm's input
    # the planner holds the head's input whole: with sequence parallelism it is gathered while backward runs
    assert model == measured - head_input + t * 40 * e


def test_a_fused_head_has_a_chunk_of_logits() -> None:
    vocabulary = {"vocab_size": 126_464, "make_vocab_size_divisible_by": 128}
    shape = Shape.of(recipe(1, "bfloat16", data=vocabulary))
    rows = CHUNK_ELEMENTS["cuda"] // 126_464
    for tokens, chunk in ((32, 32), (65_536, rows)):
        apart, fused = (
            head_bytes(shape, Layout(1, micro_batch=tokens // 16, fuse_head=choice))
            for choice in ("never", "always")
        )
        assert apart - fused == (tokens - chunk) * 126_464 * 2 - tokens * 40 * 2


@pytest.mark.parametrize("uniform_ratio", [0.0, 0.1])
@pytest.mark.parametrize("micro_batch", [1, 64, 67, 512])
def test_auto_fuses_where_training_does(uniform_ratio: float, micro_batch: int) -> None:
    vocabulary = {"vocab_size": 126_464, "make_vocab_size_divisible_by": 128}
    config = recipe(1, "bfloat16", data=vocabulary, diffusion={"uniform_ratio": uniform_ratio})
    noise = StationaryNoise(uniform_ratio, 126_464, 44)
    pays = fusing_pays(micro_batch * 16, 126_464, noise, "cuda")
    assert Layout(1, micro_batch=micro_batch).fuses_head(Shape.of(config)) == pays


# FP8 and Transformer Engine, whose tensors need a GPU: against what its code keeps, counted here by hand

FP8 = {"dtype": "bfloat16", "fp8": "hybrid"}
T, H, Q, K, F = (
    16,
    32,
    32,
    16,
    64,
)  # tokens; widths of the residual, of all query and all key heads, of the MLP
MATRICES = H * Q + 2 * H * K + Q * H + 3 * H * F


def fp8_shape(**precision: Any) -> Shape:
    model = {"num_layers": 4, "ffn_hidden_size": F, "transformer_impl": "transformer_engine"}
    return Shape.of(small_config(model=model, precision=precision, data={"seq_length": T}))


def test_fp8_keeps_two_copies_of_a_weight_of_its_layers() -> None:
    def weights(**precision: Any) -> float:
        return stage_memory(fp8_shape(**precision), Layout(1)).weights

    plain = weights(dtype="bfloat16")
    assert weights(**FP8) - plain == 4 * 2 * MATRICES
    assert weights(**FP8, num_layers_at_start_in_bf16=1) - plain == 3 * 2 * MATRICES
    assert weights(**FP8, fp8_param_gather=True) == plain


def test_fp8_keeps_the_inputs_of_products_in_a_byte() -> None:
    """Of four products: behind the norms, of SwiGLU, and of attention, whose own output stays in bfloat16."""
    plain, fp8 = (layer_activations(fp8_shape(**p), Layout(1)) for p in ({"dtype": "bfloat16"}, FP8))
    assert plain - fp8 == T * (H + H + F - Q)


def test_fused_swiglu_keeps_gate_value_and_product() -> None:
    engine = fp8_shape(dtype="bfloat16")
    local = dataclasses.replace(engine, engine=False)
    fused, apart = (layer_activations(shape, Layout(1)) for shape in (engine, local))
    assert apart - fused == 2 * T * F * 2
