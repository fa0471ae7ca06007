"""Who computes a layer where there is no GPU, and what a recipe that asks for more is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.model.small import small_config
from xdlm_megatron.model.layer_spec import who_computes
from xdlm_megatron.model.transformer_config import build_transformer_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")

BF16 = {"precision": {"dtype": "bfloat16"}}
SPLIT = {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}


def transformer(**sections: Any) -> Any:
    config = small_config(**sections)
    return build_transformer_config(config.model, config.parallel, config.precision)


@pytest.mark.parametrize("impl", ["auto", "local"])
def test_pytorch_computes_all_and_a_line_says_so(impl: str) -> None:
    config = transformer(model={"transformer_impl": impl}, **BF16)
    assert config.transformer_impl == "local"
    assert not config.gradient_accumulation_fusion
    assert who_computes(config, masked=False) == (
        "layers by PyTorch, attention by PyTorch, Adam by PyTorch, sums of weight gradients by PyTorch "
        "(Transformer Engine: not installed; apex: not installed)"
    )


def test_the_line_says_what_the_cpu_updates() -> None:
    config = transformer(**BF16)
    assert "Adam by PyTorch on the CPU for 100% of the weights, sums" in who_computes(config, False, 1.0)
    assert "CPU for 50% of the weights, the rest by PyTorch, sums" in who_computes(config, False, 0.5)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        (
            {"model": {"transformer_impl": "transformer_engine"}},
            "transformer_impl=transformer_engine needs .*take auto",
        ),
        (
            {"precision": {"dtype": "bfloat16", "fp8": "e4m3"}, "data": {"seq_length": 16}},
            r"precision\.fp8=e4m3 needs .*set precision\.fp8=null",
        ),
        (
            {"model": {"mcore": {"cpu_offloading": True, "cpu_offloading_num_layers": 1}}},
            "cpu_offloading=true needs Transformer Engine.*remove it",
        ),
        ({"model": {"mcore": {"tp_comm_overlap": True}}, **SPLIT}, "tp_comm_overlap=true needs .*remove it"),
        ({"model": {"mcore": {"cuda_graph_impl": "local"}}}, "cuda_graph_impl=local needs a GPU.*take none"),
        (
            {"model": {"mcore": {"gradient_accumulation_fusion": True}}},
            "gradient_accumulation_fusion=true needs Transformer Engine or NVIDIA's apex.*remove it",
        ),
    ],
)
def test_what_needs_more_is_refused_with_the_cure(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        transformer(**sections)
