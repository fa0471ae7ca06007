"""Our layers on the real Python of the pinned Transformer Engine: what real_engine.py reports of them.

No GPU is asked, so no number here is one of its kernels.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.model.engine_wheel import REPOSITORY, VERSION, sources
from xdlm_megatron.config.gpu_rules import FP8_MULTIPLE

PROGRAM = Path(__file__).with_name("real_engine.py")
# Keywords that megatron.core passes to versions long gone, behind a look at the version.
OF_OLD_VERSIONS = {"ub_split_ag", "ub_atomic_gemm_ag", "ub_split_rs", "ub_atomic_gemm_rs"}


@functools.cache
def report() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(sources())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=1200,  # 6 s of CPU time
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_found_and_megatron_takes_its_adam() -> None:
    found = f"Transformer Engine {VERSION} with layers, fused Adam, gradient accumulation fusion"
    assert report()["package"] == found
    assert report()["adam"].startswith("transformer_engine.")


def test_a_line_says_who_computes_what() -> None:
    whole, masked = report()["twin"]["who"]
    assert whole == (
        "layers by Transformer Engine, attention by Transformer Engine, Adam by Transformer Engine, "
        "sums of weight gradients by Transformer Engine, the head's PyTorch "
        f"({report()['package']}; apex: not installed)"
    )
    assert "attention by PyTorch" in masked  # within documents


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_its_layers_are_the_twins(dtype: str, tolerance: float) -> None:
    twin = report()["twin"][dtype]
    engine, local = twin["names"]
    assert engine == local
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight (1, 0)" in engine
    assert twin["same weights"]
    assert twin["logits"] < tolerance
    assert twin["gradients"] < tolerance
    assert twin["attention"] == ("SDPAttention" if dtype == "float32" else "TEDotProductAttention")


def test_every_checkpoint_loads_into_every_model() -> None:
    assert len(report()["twin"]["checkpoints"]) == 6  # of Transformer Engine, its twin, and delayed FP8
    assert all(report()["twin"]["checkpoints"].values())


def test_forward_calls_were_bound_to_its_signatures() -> None:
    assert [call.split("(")[0] for call in report()["calls"]] == [
        "DotProductAttention",
        "LayerNormLinear",
        "Linear",
        "RMSNorm",
    ]


@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("delayed", "DelayedScaling"),
        ("tensorwise", "Float8CurrentScaling"),
        ("blockwise", "Float8BlockScaling"),
        ("mxfp8", "MXFP8BlockScaling"),
    ],
)
def test_each_recipe_of_fp8(recipe: str, kind: str, fp8: str) -> None:
    found = report()["recipes"][f"{recipe} {fp8}"]
    assert kind in found["class"]
    assert found["format"] == fp8.upper()
    assert found["align"] == FP8_MULTIPLE[recipe]
    # Four products a layer; with the others the first layer and the last two are left in bfloat16.
    layers = [True] * 4 if recipe == "delayed" else [False, True, False, False]
    assert found["products in FP8"] == [in_fp8 for in_fp8 in layers for _ in range(4)]
    assert len(found["extra state"]) == (16 if recipe == "delayed" else 0)


def test_examples_resolve_to_its_layers_and_fp8() -> None:
    examples = report()["examples"]
    assert {name for name, fields in examples.items() if fields["fp8"]} == {"xdlm_1b_fp8", "xdlm_8b_fp8"}
    for fields in examples.values():
        by_engine = fields["transformer_impl"] == "transformer_engine"
        assert by_engine == fields["bf16"] == fields["gradient_accumulation_fusion"]
    assert examples["xdlm_8b_fp8"]["fp8_param"]


@pytest.mark.parametrize("name", ["TELinear", "TELayerNormColumnParallelLinear", "TEDotProductAttention"])
def test_it_has_every_keyword_that_megatron_passes(name: str) -> None:
    """Those of tensor-parallel overlap and context parallelism too, which nothing above has built."""
    passed = keywords_of(name)
    assert {"ub_name", "cp_group", "num_gqa_groups", "ub_bulk_wgrad", "normalization"} & passed
    assert passed - OF_OLD_VERSIONS <= set(report()["signatures"][name])


def keywords_of(name: str) -> set[str]:
    """Names of what a class of megatron.core passes to the constructor of Transformer Engine's."""
    import xdlm_megatron.parallel  # noqa: F401  (its patches come first)

    extension = (
        Path(inspect.getfile(__import__("megatron.core").core)).parent / "extensions/transformer_engine.py"
    )
    tree = ast.parse(extension.read_text())
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    keywords = set()
    for node in ast.walk(init):
        match node:
            case ast.Subscript(value=ast.Name(id="extra_kwargs"), slice=ast.Constant(value=str(key))):
                keywords.add(key)
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr="__init__")):
                keywords |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return keywords


@pytest.mark.parametrize(
    ("name", "passed"),
    [
        ("FusedAdam", {"params", "lr", "weight_decay", "betas", "eps", "adam_w_mode"}),
        ("initialize_ub", {"shape", "tp_size", "quantization_modes", "bootstrap_backend"}),
        ("fp8_autocast", {"enabled", "fp8_recipe", "fp8_group"}),
        ("fp8_model_init", {"enabled", "recipe", "preserve_high_precision_init_val"}),
        ("cast_master_weights_to_fp8", {"manual_post_all_gather_processing"}),
    ],
)
def test_it_has_what_the_optimizer_and_fp8_pass(name: str, passed: set[str]) -> None:
    assert passed <= set(report()["signatures"][name])


def test_its_offload_takes_megatrons_arguments_in_their_order() -> None:
    """They are passed by position."""
    passed = [
        "enabled",
        "num_layers",
        "model_layers",
        "offload_activations",
        "offload_weights",
        "double_buffering",
    ]
    assert report()["signatures"]["get_cpu_offload_context"][:6] == passed
