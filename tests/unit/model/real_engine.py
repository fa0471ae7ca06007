"""Builds our model of the real Transformer Engine's layers, on a CPU; prints what came out as JSON.

python real_engine.py FOLDER: the folder holds the Python of NVIDIA's package, whose libraries need a GPU.
Real are all of its classes: constructors, parameters, names, recipes, contexts. What they would launch on a
GPU (the forward of products, norms and attention) is computed by torch, after the call has been bound to the
real signature; modules that it imports and does not use here (onnx, einops, its Triton kernels) are empty.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import inspect
import itertools
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

IMPLS = ("transformer_engine", "local")
EXAMPLES = Path(__file__).parents[3] / "examples"
EMPTY = ("transformer_engine_torch", "transformer_engine.pytorch.triton", "onnx", "onnxscript", "einops")


class _Numbers(type):
    """An enumeration of the compiled library: every name that is asked for is a number of its own."""

    count = itertools.count()

    def __getattr__(cls, name: str) -> Any:
        if name == "__members__":
            return {key: value for key, value in vars(cls).items() if not key.startswith("_")}
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, cls(next(_Numbers.count)))
        return vars(cls)[name]


class _EmptyModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Numbers(name, (int,), {}) if name[0].isupper() else mock.MagicMock(name=name)
        setattr(self, name, value)
        return value


class _EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == empty or name.startswith(f"{empty}.") for empty in EMPTY):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_engine(folder: str, kernels: types.ModuleType | None = None) -> None:
    """The real Python of Transformer Engine without its libraries, for megatron.core to find.

    kernels: what its module defines stands for the same names of the compiled library.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: no libraries are loaded
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path.insert(0, folder)
    sys.meta_path.insert(0, _EmptyModules())
    import transformer_engine_torch as library

    for name, value in vars(kernels).items() if kernels else ():
        if getattr(value, "__module__", None) == kernels.__name__:
            setattr(library, name, value)
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch


@contextlib.contextmanager
def as_with_a_gpu() -> Iterator[None]:
    import torch

    cpu = torch.device("cpu")
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.current_device", return_value=cpu),
        mock.patch("torch.cuda.synchronize"),
    ):
        yield


CALLS: set[str] = set()
IN_FP8: list[bool] = []


def compute_with_torch() -> None:
    """Replaces what would launch kernels; each call is bound to the real signature first."""
    import torch
    import transformer_engine.pytorch as te
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    def replace(cls: type, compute: Callable[..., Any]) -> None:
        signature = inspect.signature(cls.forward)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self, *args, **kwargs)
            CALLS.add(f"{cls.__name__}({', '.join(list(bound.arguments)[1:])})")
            return compute(self, *args, **kwargs)

        cls.forward = forward

    def product(self: Any, x: torch.Tensor, **_: Any) -> torch.Tensor:
        IN_FP8.append(FP8GlobalStateManager.is_fp8_enabled())
        return linear(x, self.weight)

    def norm_and_product(self: Any, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return product(self, rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self.weight, self.eps)

    def attention(self: Any, q: Any, k: Any, v: Any, mask: Any, attn_mask_type: str, **_: Any) -> Any:
        assert mask is None, "full attention has no mask"
        assert attn_mask_type == "no_mask"
        S, B, N, D = q.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, scale=self.softmax_scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).reshape(S, B, N * D)

    replace(te.Linear, product)
    replace(te.LayerNormLinear, norm_and_product)
    replace(te.RMSNorm, norm)
    replace(te.DotProductAttention, attention)


def distance(a: Any, b: Any) -> float:
    return ((a - b).norm() / b.norm()).item()


def read(model: Any, groups: Any) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from xdlm_megatron.checkpoint.contents import model_state

    state = model_state([model], groups)
    apply_factories(state)
    return {
        f"{t.key} {t.global_offset}": t.data for t in nested_values(state) if isinstance(t, ShardedTensor)
    }


def compare_with_the_twin(mesh: Any, report: dict[str, Any]) -> None:
    """Parameters, their names, logits and gradients; then checkpoints from each to each, FP8's among them."""
    import torch

    from tests.unit.model.small import small_config
    from xdlm_megatron.model.build import build_model, unwrap
    from xdlm_megatron.model.layer_spec import who_computes

    ids = torch.arange(24).view(2, 12)
    for dtype in ("float32", "bfloat16"):
        models, weights, logits, gradients = {}, {}, {}, {}
        for impl in IMPLS:
            model = {"transformer_impl": impl, "zero_init_head": False}
            (chunk,) = build_model(small_config(precision={"dtype": dtype}, model=model), mesh)
            models[impl] = unwrap(chunk)
            weights[impl] = {key: value.clone() for key, value in read(models[impl], mesh.groups).items()}
            logits[impl] = chunk(ids)
            logits[impl].float().square().mean().backward()
            with torch.no_grad():
                for parameter in chunk.parameters():
                    parameter.copy_(parameter.grad)
            gradients[impl] = read(models[impl], mesh.groups)
        engine, local = (weights[impl] for impl in IMPLS)
        attention = models[IMPLS[0]].decoder.layers[0].self_attention.core_attention
        report[dtype] = {
            "names": [sorted(values) for values in weights.values()],
            "same weights": all(torch.equal(engine[key], local[key]) for key in local),
            "logits": distance(*logits.values()),
            "gradients": max(distance(gradients[IMPLS[0]][key], gradients[IMPLS[1]][key]) for key in local),
            "attention": type(attention).__name__,
        }
    fp8 = {"dtype": "bfloat16", "fp8": "hybrid", "fp8_recipe": "delayed"}
    (chunk,) = build_model(small_config(precision=fp8, data={"seq_length": 16}), mesh)
    models["delayed"] = unwrap(chunk)
    report["who"] = who_computes(chunk.config, masked=False), who_computes(chunk.config, masked=True)
    report["checkpoints"] = {
        f"{source} to {target}": load_from(models[source], models[target], mesh)
        for source, target in itertools.permutations(models, 2)
    }


def load_from(source: Any, target: Any, mesh: Any) -> bool:
    """Whether `target` has `source`'s weights after it has loaded a checkpoint of it."""
    import torch
    from megatron.core import dist_checkpointing

    from xdlm_megatron.checkpoint.contents import FORMAT, model_state
    from xdlm_megatron.checkpoint.reader import load_checkpoint

    groups = mesh.groups
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for index, value in enumerate(read(source, groups).values()):
            value.fill_(index)
        dist_checkpointing.save(
            model_state([source], groups), folder, ("torch_dist", 1), content_metadata=FORMAT
        )
        for value in read(target, groups).values():
            value.fill_(-1)
        loaded = load_checkpoint(Path(folder), model_state([target], groups), mesh)
        target.load_state_dict(loaded["model0"])
    wanted, found = read(source, groups), read(target, groups)
    return len(wanted) > 10 and all(torch.equal(wanted[key], found[key]) for key in wanted)


def try_recipes(mesh: Any, report: dict[str, Any]) -> None:
    """Each recipe of FP8: the object that stands for it, the layers that run in it, the state they keep."""
    import torch
    import transformer_engine.pytorch.quantization as quantization
    from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_recipe

    from tests.unit.model.small import small_config
    from xdlm_megatron.model.build import build_model, unwrap

    supported = (True, "")
    quantization._FP8_SUPPORT = quantization._MXFP8_SUPPORT = supported
    quantization._FP8_BLOCK_SCALING_SUPPORT = supported
    shapes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 64, "num_query_groups": 4}
    for name in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        for fp8 in ("hybrid", "e4m3"):
            precision = {"dtype": "bfloat16", "fp8": fp8, "fp8_recipe": name}
            if name != "delayed":
                precision |= {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}
            config = small_config(precision=precision, model=shapes, data={"seq_length": 32})
            (chunk,) = build_model(config, mesh)
            IN_FP8.clear()
            with torch.no_grad():
                chunk(torch.arange(32).view(1, 32))
            recipe = get_fp8_recipe(chunk.config)
            report[f"{name} {fp8}"] = {
                "class": [cls.__name__ for cls in type(recipe).__mro__],
                "format": recipe.fp8_format.name,
                "align": get_fp8_align_size(chunk.config.fp8_recipe),
                "products in FP8": list(IN_FP8),
                "extra state": [
                    key
                    for key in unwrap(chunk).sharded_state_dict(metadata={})
                    if key.endswith("_extra_state")
                ],
            }


def resolve_examples(report: dict[str, Any]) -> None:
    """The fields of every example's TransformerConfig that decide who computes what in how many bits."""
    from xdlm_megatron.config.load import load_recipe
    from xdlm_megatron.model.transformer_config import build_transformer_config

    recipes = [path for path in EXAMPLES.glob("*.yaml") if "\nsweep:" not in path.read_text()]
    for path in sorted(recipes):
        config = load_recipe(path)
        transformer = build_transformer_config(config.model, config.parallel, config.precision)
        names = ("transformer_impl", "gradient_accumulation_fusion", "bf16", "fp8", "fp8_recipe", "fp8_param")
        report[path.stem] = {name: getattr(transformer, name) for name in names}


def signatures() -> dict[str, list[str]]:
    """Parameters of what megatron.core calls of Transformer Engine, as it really is."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.module import base
    from transformer_engine.pytorch.optimizers import FusedAdam
    from transformer_engine.pytorch.tensor.utils import cast_master_weights_to_fp8

    real = {
        "TELinear": te.Linear,
        "TELayerNormColumnParallelLinear": te.LayerNormLinear,
        "TEDotProductAttention": te.DotProductAttention,
        "FusedAdam": FusedAdam,
        "initialize_ub": base.initialize_ub,
        "fp8_autocast": te.fp8_autocast,
        "fp8_model_init": te.fp8_model_init,
        "get_cpu_offload_context": te.get_cpu_offload_context,
        "cast_master_weights_to_fp8": cast_master_weights_to_fp8,
    }
    return {name: list(inspect.signature(target).parameters) for name, target in real.items()}


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    import_engine(folder)
    with as_with_a_gpu():
        # The import applies what a machine with a GPU needs, but this one has none.
        from xdlm_megatron.parallel import cpu_view, gpu_packages

        cpu_view.install()
        import megatron.core.optimizer

        from xdlm_megatron.parallel.mesh import open_mesh

        report: dict[str, Any] = {
            "package": str(gpu_packages.transformer_engine()),
            "adam": megatron.core.optimizer.Adam.__module__,
            "signatures": signatures(),
            "examples": {},
            "recipes": {},
            "twin": {},
        }
        compute_with_torch()
        resolve_examples(report["examples"])
    with open_mesh() as mesh, as_with_a_gpu():
        compare_with_the_twin(mesh, report["twin"])
        try_recipes(mesh, report["recipes"])
    print(json.dumps({**report, "calls": sorted(CALLS)}))


if __name__ == "__main__":
    main(sys.argv[1])
