"""Transformer Engine's layers against PyTorch's: logits and gradients of one model on the same weights.

Both compute in bfloat16 and are compared with PyTorch in float32, so that the twin's own rounding says what
error is to be expected. FP8 is measured beside them. In a rehearsal PyTorch's layers stand for both.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from gpu_parts.findings import Findings, part_parser
from gpu_parts.training import BF16, FLOAT32, FP8, ROOT, TINY
from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.model.build import build_model, unwrap
from xdlm_megatron.parallel.mesh import Mesh, open_mesh_for

LOCAL, ENGINE = "model.transformer_impl=local", "model.transformer_impl=transformer_engine"
CASES = {
    "PyTorch, float32": [LOCAL, FLOAT32],  # the reference
    "PyTorch, bfloat16": [LOCAL, BF16],  # the twin
    "Transformer Engine, bfloat16": [ENGINE, BF16],
    "Transformer Engine, FP8": [ENGINE, FP8],
}
TINY_CASES = {
    "PyTorch, float32": [FLOAT32],
    "PyTorch, bfloat16": [BF16],
    "PyTorch, bfloat16, again": [BF16],
}
SIZES = (
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
    "model.mcore.gradient_accumulation_fusion=false",  # the gradients are to stay with their parameters
)
FACTOR = 1.5  # of the twin's error
# Transformer Engine keeps a norm's weight in the product behind it.
TWIN_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def twin_name(name: str) -> str:
    """A parameter's name in PyTorch's layers."""
    for engine, local in TWIN_NAMES.items():
        name = name.replace(engine, local)
    return name


@torch.no_grad()
def set_weights(model: nn.Module) -> None:
    """Weights of bfloat16 as a function of name and shape, of a size that keeps activations near 1."""
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, twin_name(name))))
        drawn = torch.randn(weight.shape, generator=generator)
        drawn = 1 + 0.1 * drawn if drawn.ndim == 1 else drawn / drawn.shape[-1] ** 0.5
        weight.copy_(drawn.bfloat16())


def run_model(config: RunConfig, mesh: Mesh) -> tuple[Tensor, dict[str, Tensor]]:
    """float32 (logits [S, B, P], gradients by the twin's names) of a fixed batch and upstream gradient."""
    (chunk,) = build_model(config, mesh)
    set_weights(unwrap(chunk))
    generator = torch.Generator().manual_seed(1)
    B, S = config.train.micro_batch_size, config.data.seq_length
    zt_BS = torch.randint(0, config.data.vocab_size, (B, S), generator=generator).to(mesh.device)
    logits = chunk(zt_BS, None, False)
    upstream = torch.randn(logits.shape, generator=generator).to(logits)
    logits.backward(upstream)
    gradients = {twin_name(n): p.grad.float() for n, p in unwrap(chunk).named_parameters()}
    return logits.detach().float(), gradients


def distance(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def main() -> None:
    args = part_parser(__doc__).parse_args()
    found = Findings(args.out, "engines", "Transformer Engine against PyTorch")
    cases = TINY_CASES if args.tiny else CASES
    reference: tuple[Tensor, dict[str, Tensor]] | None = None
    errors: dict[str, tuple[float, float]] = {}
    for name, overrides in cases.items():
        sizes = TINY if args.tiny else SIZES
        config = load_recipe(ROOT / "examples/xdlm_160m.yaml", [*sizes, *overrides])
        with open_mesh_for(config.parallel) as mesh:
            logits, gradients = run_model(config, mesh)
        if reference is None:
            reference = logits, gradients
            continue
        if gradients.keys() != reference[1].keys():
            raise SystemExit(f"error: {name} has other parameters: {gradients.keys() ^ reference[1].keys()}")
        by_name = {n: distance(g, reference[1][n]) for n, g in gradients.items()}
        worst = max(by_name, key=by_name.__getitem__)
        errors[name] = distance(logits, reference[0]), statistics.median(by_name.values())
        found.row(
            "Distance from PyTorch in float32, relative",
            **{"layers by": name, "logits": errors[name][0], "gradients, median": errors[name][1]},
            **{"worst": by_name[worst], "of": worst},
        )
    twin, engine, *_ = errors
    holds = True
    for index, what in enumerate(("logits", "gradients, median")):
        ours, theirs = errors[engine][index], errors[twin][index]
        text = f"{ours:.2e}, the twin's {theirs:.2e}"
        holds &= found.claim(
            f"{engine}: error of {what}", text, f"at most {FACTOR}x", ours <= FACTOR * theirs
        )
    if not holds:
        raise SystemExit(f"error: {engine} is further from float32 than {FACTOR}x its twin")


if __name__ == "__main__":
    main()
