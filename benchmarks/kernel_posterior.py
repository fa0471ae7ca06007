"""Time, memory and reading speed of one sampling step, against the paper's posterior over all tokens and ids.

dense     q(z_s | z_t) as the authors' code makes it, [B, S, V] in float32, and a race of V noises
compiled  torch.compile of it
twin      posterior_draw.py: random numbers settle what they alone decide, the other rows' logits are read
ours      the same by the CUDA kernels; on a CPU, where there are none, the twin, and `twin` is left out
draw      of `ours` the kernel that reads the rows, alone
floor     one read of the logits

Three steps of 32: from t = 1/2, which reads few rows; the noise removal, which may read all; that with top-p.
`GB` is what a step moves: counted over its operators for `dense` (as if there were no cache), one read of the
rows for `ours`, unknown for what a compiler makes and where several reads find a nucleus, as the twin's do.
`of a copy` is the time that copying as many bytes takes in the same process over the time it took. Liger has
no sampler. Memory is the peak above the logits. Seconds are CUDA events', on a CPU the process's own CPU
time; there each form runs in a process of its own.

    python benchmarks/kernel_posterior.py --tokens 256
"""

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cases import Table, claim, device_name, is_target, run_case, within_memory
from loss_reference import DTYPES
from meter import CountBytes, baseline_mib, best_seconds, peak_mib
from torch import Tensor

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.nucleus_draw import draw_tokens
from xdlm_megatron.diffusion.posterior_draw import ReverseStep
from xdlm_megatron.diffusion.prediction import Logits
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, ChosenRows, Counters, Draw
from xdlm_megatron.kernels.dispatch import choose_kernels

KEY = (1, 5)
NUM_STEPS = 32
HALF, LAST = (0.5, 0.5 - 1 / NUM_STEPS, 1.0), (1e-5, 0.0, 1.0)
STEPS = {"t = 1/2": HALF, "noise removal": LAST, "top-p 0.9": (*LAST[:2], 0.9)}
IMPLS = ("dense", "compiled", "twin", "ours", "draw")
UNIFORM_RATIO = 0.1


def dense_step(
    logits: Tensor, zt: Tensor, alpha_s: float, alpha_t: float, top_p: float, noise: StationaryNoise
) -> Tensor:
    """The paper's step, [B, S]: the posterior over every id, then argmax of q over exponential noise."""
    k, V, mask_id = noise.uniform_ratio, noise.vocab_size, noise.mask_id
    logits = logits.float().index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        p, order = p.sort(dim=-1, descending=True)
        p = p.where(p.cumsum(-1) <= top_p, 0).scatter(-1, order[..., :1].mul(0), p[..., :1])
        p = torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))
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
    logits: Tensor,
    zt: Tensor,
    alpha_s: float,
    alpha_t: float,
    top_p: float,
    noise: StationaryNoise,
    draw: Draw,
) -> Tensor:
    row_B = torch.arange(len(zt), device=zt.device)
    rates = (torch.tensor(alpha, dtype=torch.float64) for alpha in (alpha_s, alpha_t))
    step = ReverseStep(KEY, 0, row_B, noise, *rates, top_p=top_p, draw=draw)
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
    t, s, top_p = STEPS[args.step]
    alpha_t, alpha_s = (LogLinear().alpha(torch.tensor(x, dtype=torch.float64)).item() for x in (t, s))
    x0 = torch.randint(0, V - 1, (B, S), device=device)
    counter = (torch.arange(B, device=device)[:, None], torch.arange(S, device=device))
    zt = noise.corrupt(x0, torch.full((B,), alpha_t, dtype=torch.float64), (0, 1), counter)
    return logits, zt, 1.0 if s == 0 else alpha_s, alpha_t, top_p, noise


def draw_alone(
    logits: Tensor,
    zt: Tensor,
    alpha_s: float,
    alpha_t: float,
    top_p: float,
    noise: StationaryNoise,
    draw: Draw,
) -> Callable[[], object]:
    """Of sparse_step the part that reads the logits."""
    rates = (torch.tensor(alpha, dtype=torch.float64) for alpha in (alpha_s, alpha_t))
    step = ReverseStep(KEY, 0, torch.arange(len(zt), device=zt.device), noise, *rates)
    at = step.settle(zt, zt >= 0)[1].flatten().nonzero()[:, 0]
    counters = step.counters(at, zt.shape[1])
    chosen = ChosenRows(logits.view(-1, logits.shape[-1]), at, zt.flatten()[at], counters, Shard(noise))
    return lambda: draw_tokens(draw, chosen, top_p, None)


def measure(args: argparse.Namespace) -> dict:
    """One case: the first step gives memory and bytes, the best one the time."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    is_ours = args.impl in ("ours", "draw")
    kernels = choose_kernels("cuda" if args.device == "cuda" else "auto", device) if is_ours else None
    draw = kernels.draw if kernels else REFERENCE_DRAW
    step = partial(sparse_step, draw=draw)
    if args.impl in ("dense", "compiled"):
        step = dense_step if args.impl == "dense" else torch.compile(dense_step, dynamic=False)
    # A tiny step first, so that lazily loaded libraries do not count as the step's memory; torch.compile
    # compiles for one size.
    tiny = {} if args.impl == "compiled" else {"tokens": args.batch, "vocab": 64}
    step(*make_inputs(argparse.Namespace(**vars(args) | tiny), device))
    inputs = make_inputs(args, device)
    work = draw_alone(*inputs, draw) if args.impl == "draw" else partial(step, *inputs)
    baseline = baseline_mib(device)
    with CountBytes() if args.impl == "dense" else contextlib.nullcontext() as count:
        work()
    peak = peak_mib(device)
    seconds = best_seconds(work, args.repeats, device)
    logits, zt, alpha_s, alpha_t, top_p, noise = inputs
    rates = (torch.tensor(alpha, dtype=torch.float64) for alpha in (alpha_s, alpha_t))
    reverse = ReverseStep(KEY, 0, torch.arange(len(zt), device=device), noise, *rates)
    rows_read = reverse.settle(zt, zt >= 0)[1].double().mean().item()
    size = logits.numel() * logits.element_size()
    target = torch.empty_like(logits)
    copy_seconds = best_seconds(lambda: target.copy_(logits), args.repeats, device)
    result = {"seconds": seconds, "peak_mib": peak - baseline, "copy_gb_s": 2 * size / copy_seconds / 1e9}
    if is_ours:
        result |= {"rows_read": rows_read, "read_gb": rows_read * size / 1e9}
        if top_p == 1 or reads_once(draw, inputs, top_p):
            result["moved_gb"] = result["read_gb"]
    if args.impl == "dense":
        result["moved_gb"] = count.total / 1e9
    return result


def reads_once(draw: Draw, inputs: tuple, top_p: float) -> bool:
    """Whether rows as these keep to one read with top-p: a kernel has room for them."""
    logits, zt, *_, noise = inputs
    at = torch.zeros(1, dtype=torch.int64, device=zt.device)
    chosen = ChosenRows(logits.view(-1, logits.shape[-1]), at, at, Counters(KEY, 0, at, at), Shard(noise))
    return draw.nucleus(chosen, top_p) is not None


def claims(rows: list[dict]) -> list[dict]:
    """The target on an H100: what the draw reads, at the speed of a copy, in steps that read many rows."""
    drawn = [r for r in rows if r["impl"] == "draw" and r["step"] != "t = 1/2" and "moved_gb" in r]
    names = [f"draw at V = {row['vocab']}, {row['dtype']}, {row['step']}: share of a copy" for row in drawn]
    return [claim(name, share_of_copy(row), 0.85) for name, row in zip(names, drawn, strict=True)]


def share_of_copy(row: dict) -> float:
    return row["moved_gb"] / row["seconds"] / row["copy_gb_s"]


def report(args: argparse.Namespace, rows: list[dict]) -> str:
    """The results as Markdown; ratios are to the first form of the same logits and step."""
    lines = [
        "# One sampling step: chosen rows, read once, against the paper's dense posterior",
        "",
        f"{device_name(args)}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{args.tokens} tokens in {args.batch} sequences, uniform_ratio {UNIFORM_RATIO}, "
        f"best of {args.repeats} runs.",
        "",
        f"    {args.command}",
        "",
        "Columns and units as the script explains them; logits of every position are given. floor: the",
        "logits of the rows that `ours` reads, at the speed of a copy in the same run.",
        "",
        "| V | logits | step | form | seconds | MiB | time ratio | memory ratio | GB | of a copy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [r for r in rows if all(r[name] == row[name] for name in ("vocab", "dtype", "step"))]
        base = same[0]
        lines.append(line_of(row, base))
        if row is same[-1]:
            ours = next((r for r in same if r["impl"] == "ours"), None)
        if row is same[-1] and ours:
            speed = max(r["copy_gb_s"] for r in same)
            floor = {"impl": "floor", "seconds": ours["read_gb"] / speed, "moved_gb": ours["read_gb"]}
            lines.append(line_of(ours | floor | {"peak_mib": 0.0, "copy_gb_s": speed}, base))
    return "\n".join(lines) + "\n"


def line_of(row: dict, base: dict) -> str:
    cells = [row["vocab"], row["dtype"], row["step"], row["impl"], f"{row['seconds']:.4f}"]
    cells += [
        f"{row['peak_mib']:.0f}",
        *(f"{row[name] / base[name]:.3f}" for name in ("seconds", "peak_mib")),
    ]
    if "moved_gb" in row:
        cells += [f"{row['moved_gb']:.3f}", f"{share_of_copy(row):.1%}"]
    else:
        cells += ["", ""]
    return "| " + " | ".join(map(str, cells)) + " |"


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
    parser.add_argument("--impl", choices=IMPLS, default="ours", help="with --measure")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    args.command = " ".join(["python", "benchmarks/kernel_posterior.py", *sys.argv[1:]])
    impls = IMPLS if args.device == "cuda" else ("dense", "compiled", "ours")
    cases = [
        {"vocab": vocab, "dtype": dtype, "step": step, "impl": impl}
        for vocab in args.vocabularies
        for dtype in args.dtypes
        for step in STEPS
        for impl in impls
    ]
    names = ("device", "tokens", "batch", "repeats", "threads")
    table = Table(
        args,
        "kernel_posterior",
        lambda rows: report(args, rows),
        {"tokens": args.tokens},
        {"uniform_ratio": UNIFORM_RATIO},
        lambda rows: claims(rows) if is_target(args) else [],
    )
    table.fill(cases, within_memory(lambda case: run_case(__file__, args, names, case, measure), cases))


if __name__ == "__main__":
    main()
