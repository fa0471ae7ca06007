"""The planner's messages against those that a real layer sends, counted as they are sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.launch.ranks import FULL, MLP, rank_of, recipe
from xdlm_megatron.launch.cost import context_bytes, step_cost, tensor_messages
from xdlm_megatron.launch.gpus import GPUS
from xdlm_megatron.launch.layout import Layout, Shape, recipe_layout
from xdlm_megatron.launch.memory import rank_parameters
from xdlm_megatron.model.build import build_model

TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
CP = {"context_parallel_size": 2}


class Counter(TorchDispatchMode):
    """Calls and bytes of collectives: an all-gather or reduce-scatter of N bytes sends N/2 on two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.sent = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            self.calls += 1
            if "allreduce" in name:
                self.sent += args[0][0].nbytes
            else:
                assert "allgather" in name or "reduce_scatter" in name
                self.sent += max(args[0].nbytes, args[1].nbytes) / 2
        return func(*args, **(kwargs or {}))


def send_of(num_layers: int, world: int, sections: dict[str, Any]) -> Counter:
    """Forward and backward of one micro-batch through the whole model."""
    config = recipe(num_layers, "bfloat16", **sections)
    counter = Counter()
    with rank_of(config, 0, world) as mesh:
        (chunk,) = build_model(config, mesh)
        chunk.train()
        zt_BS = torch.randint(0, 44, (2, 16 // config.parallel.context_parallel_size))
        with counter:
            chunk(zt_BS).sum().backward()
    return counter


@pytest.mark.parametrize("mcore", [{}, MLP, FULL])
@pytest.mark.parametrize("parallel", [TP, SP, CP])
def test_messages_of_a_micro_batch(parallel: dict[str, Any], mcore: dict[str, Any]) -> None:
    for num_layers in (1, 3):
        sections = {"parallel": parallel, "model": {"mcore": mcore}}
        counted = send_of(num_layers, 2, sections)
        config = recipe(num_layers, "bfloat16", **sections)
        shape, layout = Shape.of(config), recipe_layout(config, 2)
        calls, rounds = tensor_messages(shape, layout)
        if layout.cp > 1:
            assert (calls, rounds) == (0, 0)
            assert counted.sent == context_bytes(shape, layout)
        else:
            assert counted.calls == calls
            assert counted.sent == rounds * (2 * 16 * 40 * 2) / 2
            assert context_bytes(shape, layout) == 0


def test_traffic_of_a_step() -> None:
    """By hand: 2 stages of 2 layers, 4 micro-batches of 2 x 16 tokens, width 40, bfloat16."""
    shape = Shape.of(recipe(4, "bfloat16", train={"micro_batch_size": 2, "global_batch_size": 16}))
    step = step_cost(shape, Layout(4, pp=2, micro_batch=2), GPUS["h100"])
    assert step.traffic.pipeline == 4 * 2 * (32 * 40 * 2)  # forward and backward
    assert step.bubble_share == pytest.approx(1 / 4)
    parameters = max(rank_parameters(shape, Layout(4, pp=2), stage) for stage in (0, 1))
    assert step.traffic.data == parameters / 2 * (4 + 2)  # reduce-scatter float32, all-gather bfloat16
    assert (step.traffic.tensor, step.traffic.context) == (0, 0)
    interleaved = step_cost(shape, Layout(4, pp=2, vpp=2, micro_batch=2), GPUS["h100"])
    assert interleaved.bubble_share == pytest.approx(1 / 8)
    assert interleaved.traffic.pipeline == 2 * step.traffic.pipeline


def test_mfu_is_useful_flops_over_peak() -> None:
    config = recipe(4, "bfloat16")
    shape = Shape.of(config)
    for recompute in ("none", "full"):
        step = step_cost(shape, Layout(8, micro_batch=1, recompute=recompute), GPUS["h100"])
        useful = shape.flops_per_token * 8 * 16 / step.seconds.total / 8
        assert step.mfu == pytest.approx(useful / 989e12)
    assert step.days == pytest.approx(step.seconds.total * 10 / 86400)


def test_what_costs_more_takes_longer() -> None:
    """A model of 8 billion parameters on 64 H100."""
    model = {
        "hidden_size": 4096,
        "ffn_hidden_size": 12288,
        "num_attention_heads": 32,
        "num_query_groups": 32,
        "kv_channels": 128,
    }
    config = recipe(
        32,
        "bfloat16",
        model=model,
        data={"seq_length": 4096, "vocab_size": 126_464},
        train={"micro_batch_size": 1, "global_batch_size": 512},
    )
    shape = Shape.of(config)

    def seconds(gpu: str = "h100", **layout: Any) -> float:
        return step_cost(shape, Layout(64, **layout), GPUS[gpu]).seconds.total

    assert seconds(recompute="full") > seconds(recompute="mlp") > seconds()
    assert seconds(pp=4) > seconds(pp=4, vpp=4)
    assert seconds(tp=4) > seconds()
    assert seconds("a100") > 2 * seconds() > 2 * seconds("h200") > 2 * seconds("b200")
    # tensor parallelism that leaves its node goes at the network's rate
    assert seconds(tp=16, sequence_parallel=True) > 2 * seconds(tp=8, sequence_parallel=True)
    assert 0.3 < step_cost(shape, Layout(64), GPUS["h100"]).mfu < 0.6
