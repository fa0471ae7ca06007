"""Time and peak memory of sampling from one model: ours against the paper's dense posterior at every step.

`dense` runs the head at every position and makes the posterior of every position over every id
(kernel_posterior.py). `ancestral` draws from the same law by `sample` of the command line: the head and one
read of the logits where random numbers leave a position undecided. --impls takes other samplers too, whose
rules are their own, for their cost. The network below the head is the same, with the same random weights;
all take --steps steps, but `saber`, which chooses its own, and the first two the noise removal besides. Each
form runs in a process of its own, memory is the peak above the model. Seconds are the process's own on a CPU,
so that other processes hardly matter.

    python benchmarks/sampling.py --layers 12 --hidden 768 --vocab 50258
"""

import argparse
import json
import platform
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from cases import device_name, spawn, write_results
from kernel_posterior import UNIFORM_RATIO, dense_step
from loss_reference import DTYPES
from meter import baseline_mib, peak_mib, seconds_of
from pydantic import TypeAdapter
from torch import Tensor
from tqdm import tqdm

from xdlm_megatron.config.load import build_config
from xdlm_megatron.config.samplers import AnySampler, Sampler
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.evaluation.generation import SampleOptions, build_denoiser, generate, observe
from xdlm_megatron.kernels.dispatch import choose_kernels
from xdlm_megatron.model.build import build_model
from xdlm_megatron.parallel.mesh import open_mesh
from xdlm_megatron.samplers import SAMPLERS

IMPLS = ("dense", *SAMPLERS)


def recipe(args: argparse.Namespace, vocab: int, seq_length: int) -> RunConfig:
    heads = max(1, args.hidden // 64)
    return build_config(
        {
            "run": {"name": "sampling", "seed": 1},
            "model": {
                "num_layers": args.layers,
                "hidden_size": args.hidden,
                "ffn_hidden_size": 4 * args.hidden,
                "num_attention_heads": heads,
                "zero_init_head": False,
            },
            "data": {
                "train_prefix": "none",
                "tokenizer": "none",
                "seq_length": seq_length,
                "vocab_size": vocab,
                "mask_id": vocab - 1,
            },
            "optimizer": {"lr": 1e-3},
            "lr_schedule": {"kind": "constant"},
            "train": {"num_steps": 1, "micro_batch_size": args.batch, "global_batch_size": args.batch},
            "precision": {"dtype": args.dtype},
            "tracking": {"mlflow": None},
        }
    )


@torch.no_grad()
def sample_dense(model: torch.nn.Module, args: argparse.Namespace, noise: StationaryNoise, S: int) -> Tensor:
    """The reverse loop as the paper writes it, [B, S]."""
    device = next(model.parameters()).device
    model.eval()
    counter = (torch.arange(args.batch, device=device)[:, None], torch.arange(S, device=device))
    zt = noise.sample_prior((1, 4), counter)
    alphas = LogLinear().alpha(torch.linspace(1, 1e-5, args.steps + 1, dtype=torch.float64)).tolist()
    for alpha_t, alpha_s in pairwise([*alphas, 1.0]):
        logits = model(zt).transpose(0, 1)[..., : noise.vocab_size]
        zt = dense_step(logits, zt, alpha_s, alpha_t, 1.0, noise)
    return zt


def settings_of(args: argparse.Namespace) -> AnySampler:
    steps = {} if args.impl == "saber" else {"num_steps": args.steps}
    return TypeAdapter(Sampler).validate_python({"kind": args.impl, **steps})


def measure(args: argparse.Namespace) -> dict:
    """One form, in this process; a run on a toy vocabulary comes first, so that libraries are loaded."""
    torch.set_num_threads(args.threads)
    with open_mesh() as mesh:
        for vocab, S in ((256, 8), (args.vocab, args.tokens // args.batch)):
            chunks = build_model(recipe(args, vocab, S), mesh)
            noise = StationaryNoise(UNIFORM_RATIO, vocab, vocab - 1)
            draw = choose_kernels("auto", mesh.device).draw
            options = SampleOptions(num_samples=args.batch)
            baseline = baseline_mib(mesh.device)
            if args.impl == "dense":
                work = partial(sample_dense, chunks[0], args, noise, S)
            else:
                observed = observe(S, [], [], mesh.device)
                denoise, settings = build_denoiser(chunks, mesh), settings_of(args)
                request = (denoise, options, settings, noise, LogLinear(), observed, args.batch, draw)
                work = partial(generate, *request)
            seconds = seconds_of(work, mesh.device)
        peak = peak_mib(mesh.device)
    return {"seconds": seconds, "peak_mib": peak - baseline}


def report(args: argparse.Namespace, rows: list[dict]) -> str:
    """The results as Markdown; ratios are to `dense`."""
    base = rows[0]
    whole = args.tokens * args.vocab * 4 / 2**20
    lines = [
        "# Sampling: the head and one read where a position is undecided, against the dense posterior",
        "",
        f"{device_name(args)}, torch {torch.__version__}, Python {platform.python_version()}; {args.layers} "
        f"layers, H = {args.hidden}, V = {args.vocab}, {args.dtype}; {args.tokens} tokens in {args.batch} "
        f"sequences, {args.steps} steps, uniform_ratio {UNIFORM_RATIO}.",
        "",
        f"    {args.command}",
        "",
        "`dense` and `ancestral` draw from one law, noise removal included; other samplers have rules of "
        "their own, and `saber` chooses its number of steps. Memory is the peak above the model, where one "
        f"float32 tensor [B, L, V] would be {whole:.0f} MiB, and 0 is below the meter; seconds are "
        "the process's own, with the network below the head.",
        "",
        "| form | seconds | tokens/s | MiB | time ratio | memory ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['impl']} | {row['seconds']:.2f} | {args.tokens / row['seconds']:.1f} "
            f"| {max(0.0, row['peak_mib']):.0f} | {row['seconds'] / base['seconds']:.3f} "
            f"| {max(0.0, row['peak_mib']) / base['peak_mib']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256, help="tokens to sample")
    parser.add_argument("--batch", type=int, default=2, help="sequences; divides --tokens")
    parser.add_argument("--steps", type=int, default=32, help="network calls before the noise removal")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=126464)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the network")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--impls", nargs="+", choices=IMPLS, default=["dense", "ancestral"], help="which, `dense` first"
    )
    parser.add_argument("--name", default="sampling", help="of the result's files")
    parser.add_argument("--out", type=Path, help="folder of the results [benchmarks/results/DEVICE]")
    parser.add_argument("--measure", action="store_true", help="measure one form here and print it as JSON")
    parser.add_argument("--impl", choices=IMPLS, default="ancestral", help="with --measure")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.measure:
        print(json.dumps(measure(args)))
        return
    args.command = " ".join(["python", "benchmarks/sampling.py", *sys.argv[1:]])
    names = ("tokens", "batch", "threads", "steps", "layers", "hidden", "vocab", "dtype")
    options = {name: getattr(args, name) for name in names}
    rows = [
        options | spawn(__file__, options, {"impl": impl})
        for impl in tqdm(args.impls, desc="sampling", unit="form")
    ]
    write_results(args, args.name, report(args, rows), {}, {"uniform_ratio": UNIFORM_RATIO, "rows": rows})


if __name__ == "__main__":
    main()
