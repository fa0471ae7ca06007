"""Time, memory and reading speed of one sampling step, against the paper's posterior over all tokens and ids.

`dense` makes q(z_s | z_t) as the authors' code does, [B, S, V] in float32, and draws from it by a race of V
noises. `ours` settles what random numbers alone decide, then reads the logits of the other rows once
(posterior_draw.py; on CUDA by the kernel, and by its PyTorch twin as `twin`). Two steps of 32: the one from
t = 1/2, which reads few rows, and the noise removal, which may read all. The read speed is that of the draw
alone, of all rows: bytes of logits over the time, as a share of what a copy of the same logits moves (bytes
read and written) in the same process; `floor` is the time of reading them at that speed. Each form runs in a
process of its own; memory is the peak above the logits. Seconds are CUDA events', on a CPU the process's own
CPU time, so that other processes hardly matter.

    python benchmarks/kernel_posterior.py --tokens 256
"""

import argparse
import json
import platform
import sys
from functools import partial
from pathlib import Path

import torch
from cases import device_name, spawn, write_results
from loss_reference import DTYPES
from meter import baseline_mib, best_seconds, peak_mib
from torch import Tensor
from tqdm import tqdm

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.posterior_draw import ReverseStep
from xdlm_megatron.diffusion.prediction import Logits
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW
from xdlm_megatron.kernels.dispatch import choose_kernels

KEY = (1, 5)
NUM_STEPS = 32
STEPS = {"t = 1/2": (0.5, 0.5 - 1 / NUM_STEPS), "noise removal": (1e-5, 0.0)}
UNIFORM_RATIO = 0.1


def dense_step(logits: Tensor, zt: Tensor, alpha_s: float, alpha_t: float, noise: StationaryNoise) -> Tensor:
    """The paper's step, [B, S]: the posterior over every id, then argmax of q over exponential noise."""
    k, V, mask_id = noise.uniform_ratio, noise.vocab_size, noise.mask_id
    logits = logits.float().index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
    p = logits.softmax(-1)
    pi = torch.full((V,), k / V, device=p.device)
    pi[mask_id] += 1 - k
    here = zt[..., None]
    f_t = alpha_t * p.gather(-1, here) + (1 - alpha_t) * pi[here]
    f_s = alpha_s * p + (1 - alpha_s) * pi
    f_ts = (1 - alpha_t / alpha_s) * pi[here] * torch.ones_like(p)
    f_ts.scatter_add_(-1, here, torch.full_like(f_t, alpha_t / alpha_s))
    q = f_s * f_ts / f_t
    return (q / (1e-10 - (torch.rand_like(q) + 1e-10).log())).argmax(-1)


def sparse_step(
    logits: Tensor, zt: Tensor, alpha_s: float, alpha_t: float, noise: StationaryNoise, draw: object
) -> Tensor:
    row_B = torch.arange(len(zt), device=zt.device)
    rates = (torch.tensor(alpha, dtype=torch.float64) for alpha in (alpha_s, alpha_t))
    step = ReverseStep(KEY, 0, row_B, noise, *rates, draw=draw)
    zs, undecided = step.settle(zt, torch.ones_like(zt, dtype=torch.bool))
    return Logits(logits).replace(zs, undecided, partial(step.pick, zt))


def make_inputs(args: argparse.Namespace, device: torch.device) -> tuple:
    """Logits of std 2, and z_t of random tokens at the step's noise level."""
    torch.manual_seed(0)
    B, S, V = args.batch, args.tokens // args.batch, args.vocab
    noise = StationaryNoise(UNIFORM_RATIO, V, V - 1)
    logits = torch.empty(B, S, V, dtype=DTYPES[args.dtype], device=device)
    for row in logits.view(-1, V):  # a row at a time: no float32 peak before the baseline
        row.copy_(torch.randn(V, device=device) * 2)
    t, s = STEPS[args.step]
    alpha_t, alpha_s = (LogLinear().alpha(torch.tensor(x, dtype=torch.float64)).item() for x in (t, s))
    x0 = torch.randint(0, V - 1, (B, S), device=device)
    counter = (torch.arange(B, device=device)[:, None], torch.arange(S, device=device))
    zt = noise.corrupt(x0, torch.full((B,), alpha_t, dtype=torch.float64), (0, 1), counter)
    return logits, zt, 1.0 if s == 0 else alpha_s, alpha_t, noise


def measure(args: argparse.Namespace) -> dict:
    """One case, in this process: the first step gives the memory, the others the time."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    draw = choose_kernels("auto", device).draw if args.impl == "ours" else REFERENCE_DRAW
    step = dense_step if args.impl == "dense" else partial(sparse_step, draw=draw)
    # A tiny step first, so that lazily loaded libraries do not count as the step's memory.
    step(*make_inputs(argparse.Namespace(**vars(args) | {"tokens": args.batch, "vocab": 64}), device))
    inputs = make_inputs(args, device)
    baseline = baseline_mib(device)
    step(*inputs)
    peak = peak_mib(device)
    result = {
        "seconds": best_seconds(lambda: step(*inputs), args.repeats, device),
        "peak_mib": peak - baseline,
        "rows_read": 1.0,
    }
    if args.impl == "dense":
        return result
    logits, zt, alpha_s, alpha_t, noise = inputs
    rows = logits.view(-1, logits.shape[-1])
    index = torch.arange(len(rows), device=device)
    rates = (torch.tensor(alpha, dtype=torch.float64) for alpha in (alpha_s, alpha_t))
    reverse = ReverseStep(KEY, 0, index[: len(zt)], noise, *rates)
    result["rows_read"] = reverse.settle(zt, zt >= 0)[1].double().mean().item()
    if args.step != "noise removal":
        return result
    counters = reverse.counters(index, zt.shape[1])
    target = torch.empty_like(rows)
    size = rows.numel() * rows.element_size()
    arguments = (rows, index, zt.flatten(), counters, Shard(noise))
    draw_seconds = best_seconds(lambda: draw.shard(*arguments), args.repeats, device)
    copy_seconds = best_seconds(lambda: target.copy_(rows), args.repeats, device)
    read, copied = size / draw_seconds, 2 * size / copy_seconds
    return result | {"read_gb_s": read / 1e9, "copy_gb_s": copied / 1e9, "share_of_copy": read / copied}


def report(args: argparse.Namespace, rows: list[dict]) -> str:
    """The results as Markdown; ratios are to `dense` of the same logits and step."""
    lines = [
        "# One sampling step: chosen rows, read once, against the paper's dense posterior",
        "",
        f"{device_name(args)}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{args.tokens} tokens in {args.batch} sequences, uniform_ratio {UNIFORM_RATIO}, "
        f"best of {args.repeats} runs.",
        "",
        f"    {args.command}",
        "",
        "Logits of every position are given; memory is the peak above them, seconds are this process's own.",
        "GB/s: bytes of logits a second, where the draw reads every row; of a copy: its share of what a",
        "copy of the logits moves (read and written) in the same process. floor: one read at that speed.",
        "",
        "| V | logits | step | form | rows | seconds | MiB | time ratio | memory ratio | GB/s | of a copy |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = ("vocab", "dtype", "step")
        base = next(r for r in rows if r["impl"] == "dense" and all(r[name] == row[name] for name in same))
        read = "| | |"
        if "read_gb_s" in row:
            read = f"| {row['read_gb_s']:.2f} | {row['share_of_copy']:.1%} |"
        lines.append(
            f"| {row['vocab']} | {row['dtype']} | {row['step']} | {row['impl']} "
            f"| {row['rows_read']:.1%} | {row['seconds']:.4f} "
            f"| {row['peak_mib']:.0f} | {row['seconds'] / base['seconds']:.3f} "
            f"| {row['peak_mib'] / base['peak_mib']:.3f} {read}"
        )
        if "copy_gb_s" in row and row["impl"] == "ours":
            size = args.tokens * row["vocab"] * DTYPES[row["dtype"]].itemsize
            floor = size / (1e9 * row["copy_gb_s"])
            lines.append(
                f"| {row['vocab']} | {row['dtype']} | {row['step']} | floor | 100.0% | {floor:.4f} "
                f"| 0 | {floor / base['seconds']:.3f} | 0.000 | {row['copy_gb_s']:.2f} | 100.0% |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 256, help="tokens a step")
    parser.add_argument("--batch", type=int, default=8, help="sequences; divides --tokens")
    parser.add_argument("--repeats", type=int, default=10 if cuda else 3, help="timed steps; the best counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 126464])
    parser.add_argument("--out", type=Path, help="folder of the results [benchmarks/results/DEVICE]")
    parser.add_argument("--measure", action="store_true", help="measure one case here and print it as JSON")
    parser.add_argument("--vocab", type=int, default=32000, help="with --measure")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the logits")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="with --measure")
    parser.add_argument("--step", choices=STEPS, default="t = 1/2", help="with --measure")
    parser.add_argument("--impl", choices=("dense", "twin", "ours"), default="ours", help="with --measure")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    args.command = " ".join(["python", "benchmarks/kernel_posterior.py", *sys.argv[1:]])
    impls = ("dense", "twin", "ours") if args.device == "cuda" else ("dense", "ours")
    cases = [
        {"vocab": vocab, "dtype": dtype, "step": step, "impl": impl}
        for vocab in args.vocabularies
        for dtype in args.dtypes
        for step in STEPS
        for impl in impls
    ]
    names = ("device", "tokens", "batch", "repeats", "threads")
    options = {name: getattr(args, name) for name in names}
    rows = [spawn(__file__, options, case) for case in tqdm(cases, desc="posterior", unit="case")]
    write_results(
        args,
        "kernel_posterior",
        report(args, rows),
        {"tokens": args.tokens},
        {"uniform_ratio": UNIFORM_RATIO, "rows": rows},
    )


if __name__ == "__main__":
    main()
