"""The 1B recipe on one GPU, in bfloat16 and FP8: tokens a second, MFU, and its memory by part beside `plan`.

MFU counts full (bidirectional) attention, no recomputation, and divides by the bfloat16 peak in both. The
parts of memory are the bytes of the tensors that are held; the rest of the peak is what a step takes.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from meter import baseline_mib, peak_mib

from gpu_parts.findings import ChildError, Findings, part_parser, run_child
from gpu_parts.training import FLOAT32, FP8, open_run, prepare
from xdlm_megatron.launch.layout import Shape, recipe_layout
from xdlm_megatron.launch.memory import stage_memory
from xdlm_megatron.model.transformer_config import DTYPES
from xdlm_megatron.train.peak import peak_flops
from xdlm_megatron.train.run import Run
from xdlm_megatron.train.state import TrainState

WARM_UP, TIMED = 3, 8  # steps
GIB = 2**30
SMALLEST_GAIN = 1.2  # of FP8 in tokens a second
MEMORY_TOLERANCE = 0.05


def measure(recipe: list[str]) -> dict[str, Any]:
    """One precision, in this process."""
    with open_run(recipe) as (config, run):
        state, device = TrainState(), run.mesh.device
        for _ in range(WARM_UP):
            run.step(state)
        held = baseline_mib(device) / 1024
        seconds = [_timed(run, state, device) for _ in range(TIMED)]
        peak = peak_mib(device) / 1024
        plan = stage_memory(Shape.of(config), recipe_layout(config, 1))
        rate, source = peak_flops(device, DTYPES[config.precision.dtype])
        step = statistics.median(seconds)
        tokens = run.derived.tokens_per_step / step
        parts = {name: size / GIB for name, size in held_bytes(run).items()}
        return {
            "parameters": run.derived.num_parameters,
            "tokens_per_step": run.derived.tokens_per_step,
            "seconds_per_step": step,
            "slowest_step": max(seconds),
            "tokens_per_second": tokens,
            "flops_per_token": run.derived.flops_per_token,
            "mfu": tokens * run.derived.flops_per_token / rate,
            "peak_rate": source,
            "held_gib": parts | {"other": held - sum(parts.values()), "step": peak - held, "total": peak},
            "plan_gib": {
                "weights": plan.weights / GIB,
                "gradients": plan.gradients / GIB,
                "optimizer": plan.optimizer / GIB,
                "ema": plan.ema / GIB,
                "step": (plan.activations + plan.working + plan.head_and_loss) / GIB,
                "total": (plan.total - plan.reserve) / GIB,
            },
        }


def _timed(run: Run, state: TrainState, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run.step(state)  # reads the gradient norm, so that it ends when the device is nearly done
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def held_bytes(run: Run) -> dict[str, int]:
    """Bytes of what stays between steps: weights, gradients, optimizer (master weights too), average."""
    parameters = [p for chunk in run.chunks for p in chunk.parameters()]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    outer = run.step.optimizer
    optimizers = outer.chained_optimizers if isinstance(outer, ChainedOptimizer) else [outer]
    optimizer = 0
    for inner in (one.optimizer for one in optimizers):
        for main in (p for group in inner.param_groups for p in group["params"]):
            if main.untyped_storage().data_ptr() not in weights:
                optimizer += main.nbytes
            optimizer += sum(v.nbytes for v in inner.state[main].values() if torch.is_tensor(v))
    return {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters),
        "optimizer": optimizer,
        "ema": 0 if run.step.ema is None else run.step.ema.num_bytes,
    }


def main() -> None:
    parser = part_parser(__doc__)
    parser.add_argument("--measure", nargs="+", metavar="RECIPE", help="measure one recipe here")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)), flush=True)
        return
    found = Findings(args.out, "speed", "1B in bfloat16 and FP8: speed and memory")
    found.note(
        "MFU counts full (bidirectional) attention and no recomputation, against the bfloat16 peak. `plan` "
        "has 3 GiB more in reserve for CUDA, libraries and fragments, which the allocator does not see."
    )
    size = [] if args.tiny else ["train.global_batch_size=16"]
    cases = {"float32": [FLOAT32]} if args.tiny else {"bfloat16": [], "FP8": [FP8]}
    results: dict[str, dict[str, Any]] = {}
    failures = []
    for name, overrides in cases.items():
        recipe = prepare(args.out, "speed", "xdlm_1b.yaml", args.tiny, [*size, *overrides])
        options = ["-m", "gpu_parts.speed", "--out", str(args.out), "--measure", *recipe]
        try:
            run_child(options, lambda result, name=name: results.update({name: result}))
            add(found, name, results[name], is_claim=not args.tiny)
        except ChildError as error:
            failures.append(f"{name}: {error}")
            found.note(f"{name} failed: {error}")
    if len(results) == 2:
        gain = results["FP8"]["tokens_per_second"] / results["bfloat16"]["tokens_per_second"]
        found.claim(
            "FP8 against bfloat16, tokens/s",
            f"{gain:.2f}x",
            f"at least {SMALLEST_GAIN}x",
            gain >= SMALLEST_GAIN,
        )
    if failures:
        raise SystemExit("error: " + "; ".join(failures))


def add(found: Findings, name: str, result: dict[str, Any], is_claim: bool) -> None:
    """The rows of one precision; is_claim: its memory is compared with the plan's target."""
    found.fact(**{name: result})
    found.row(
        "Speed",
        precision=name,
        **{"parameters, M": round(result["parameters"] / 1e6), "tokens a step": result["tokens_per_step"]},
        **{"s a step": result["seconds_per_step"], "slowest": result["slowest_step"]},
        **{"tokens/s": round(result["tokens_per_second"]), "GFLOP a token": result["flops_per_token"] / 1e9},
        MFU=f"{result['mfu']:.1%}",
        against=result["peak_rate"],
    )
    held, plan = result["held_gib"], result["plan_gib"]
    for part, gib in held.items():
        planned = plan.get(part)
        ratio = gib / planned if planned else None
        found.row("Memory, GiB", precision=name, part=part, measured=gib, plan=planned, ratio=ratio)
    if is_claim:
        error = held["total"] / plan["total"] - 1
        text = f"{held['total']:.1f} GiB, plan {plan['total']:.1f} ({error:+.1%})"
        found.claim(f"memory of {name} against plan", text, "within 5 %", abs(error) <= MEMORY_TOLERANCE)


if __name__ == "__main__":
    main()
