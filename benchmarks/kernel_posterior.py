"""Time, memory and reading speed of one sampling step, against the paper's posterior over all tokens and ids.

dense     q(z_s | z_t) as the authors' code makes it, [B, S, V] in float32, and a race of V noises
compiled  torch.compile of it
twin      posterior_draw.py: random numbers settle what they alone decide, the other rows' logits are read
ours      the same by the CUDA kernels; on a CPU, where there are none, the twin, and `twin` is left out
draw      of `ours` the part that reads the rows, alone
surveyed  the same with top-p as each of several ranks works, without their messages; where there are kernels
floor     one pure read of the logits

Three steps of 32: from t = 1/2, which reads few rows; the noise removal, which may read all; that with top-p.
`reads` is how often the kernels read a chosen row, those counted that a survey has to see again. `GB` is what
a step moves: those reads, or for `dense` counted over its operators (as if there were no cache); unknown for
what a compiler makes and where several reads find a nucleus, as the twin's do. Two speeds are measured in the
same process: `of a copy` is the time that copying as many bytes takes, a read and a write, over the time it
took; `of a read`, by which the draw is judged, that of reading as many bytes as the chosen rows have by the
fastest of PyTorch's reductions. Liger has no sampler. Memory is the peak above the logits. Seconds are CUDA
events', on a CPU the process's own CPU time; there each form runs in a process of its own.

    python benchmarks/kernel_posterior.py --tokens 256
"""

import argparse
import contextlib
import json
import platform
import sys
from dataclasses import replace
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
from xdlm_megatron.diffusion.survey import BinTokens, Survey
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, ChosenRows, Draw
from xdlm_megatron.kernels.dispatch import choose_kernels

COLUMNS = ("V", "logits", "step", "form", "seconds", "MiB", "time ratio", "memory ratio")
COLUMNS += ("reads", "GB", "of a copy", "of a read")
KEY = (1, 5)
NUM_STEPS = 32
HALF, LAST = (0.5, 0.5 - 1 / NUM_STEPS, 1.0), (1e-5, 0.0, 1.0)
STEPS = {"t = 1/2": HALF, "noise removal": LAST, "top-p 0.9": (*LAST[:2], 0.9)}
IMPLS = ("dense", "compiled", "twin", "ours", "draw", "surveyed")
OURS = IMPLS[3:]
LATE = ("twin", "dense", "compiled")  # after what targets are of
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


def rows_of(
    logits: Tensor, zt: Tensor, alpha_s: float, alpha_t: float, top_p: float, noise: StationaryNoise
) -> ChosenRows:
    """Of the logits those that sparse_step reads."""
    rates = (torch.tensor(alpha, dtype=torch.float64) for alpha in (alpha_s, alpha_t))
    step = ReverseStep(KEY, 0, torch.arange(len(zt), device=zt.device), noise, *rates)
    at = step.settle(zt, zt >= 0)[1].flatten().nonzero()[:, 0]
    counters = step.counters(at, zt.shape[1])
    return ChosenRows(logits.view(-1, logits.shape[-1]), at, zt.flatten()[at], counters, Shard(noise))


def measure(args: argparse.Namespace) -> dict:
    """One case: the first step gives memory and bytes, the best one the time."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    draw = REFERENCE_DRAW
    if args.impl in OURS:
        draw = choose_kernels("cuda" if args.device == "cuda" else "auto", device).draw
    if args.impl == "surveyed":
        draw = draw._replace(nucleus=lambda rows, top_p: None)
    step = partial(sparse_step, draw=draw)
    if args.impl in ("dense", "compiled"):
        step = dense_step if args.impl == "dense" else torch.compile(dense_step, dynamic=False)
    # A tiny step first, so that lazily loaded libraries do not count as the step's memory; torch.compile
    # compiles for one size.
    tiny = {} if args.impl == "compiled" else {"tokens": args.batch, "vocab": 64}
    step(*make_inputs(argparse.Namespace(**vars(args) | tiny), device))
    inputs = make_inputs(args, device)
    work = partial(step, *inputs)
    if args.impl in ("draw", "surveyed"):
        work = partial(draw_tokens, draw, rows_of(*inputs), STEPS[args.step][2], None)
    baseline = baseline_mib(device)
    with CountBytes() if args.impl == "dense" else contextlib.nullcontext() as count:
        work()
    peak = peak_mib(device)
    result = {"seconds": best_seconds(work, args.repeats, device), "peak_mib": peak - baseline}
    if args.impl == "dense":
        result["moved_gb"] = count.total / 1e9
    if args.impl in OURS:
        result |= read_of_rows(rows_of(*inputs), draw, args)
    logits = inputs[0]
    target = torch.empty_like(logits)
    copy_seconds = best_seconds(lambda: target.copy_(logits), args.repeats, device)
    size = logits.numel() * logits.element_size()
    return result | {"copy_gb_s": 2 * size / copy_seconds / 1e9}


def read_of_rows(chosen: ChosenRows, draw: Draw, args: argparse.Namespace) -> dict:
    """The bytes of the chosen rows, the speed of reading as many, and what the kernels read."""
    M, V = len(chosen.index_M), chosen.logits_NP.shape[1]
    if M == 0:
        raise ValueError(f"{args.step}: no row to read among {args.tokens} tokens; take more")
    gigabytes = M * V * chosen.logits_NP.element_size() / 1e9
    result = {"rows": M, "read_gb": gigabytes}
    result["read_gb_s"] = gigabytes / read_seconds(chosen.logits_NP[:M], args)
    reads = reads_a_row(draw, chosen, STEPS[args.step][2])
    return result if reads is None else result | {"reads": reads, "moved_gb": reads * gigabytes}


def read_seconds(logits_MP: Tensor, args: argparse.Namespace) -> float:
    """Of one pure read: the fastest of PyTorch's reductions over the same bytes, whatever they mean."""
    words = logits_MP.flatten()[: logits_MP.numel() // 2 * 2].view(torch.int32)
    reductions = (words.amax, words.view(torch.float32).amax, words.view(torch.float32).sum)
    device = logits_MP.device
    return min(best_seconds(reduction, args.repeats, device) for reduction in reductions)


def reads_a_row(draw: Draw, chosen: ChosenRows, top_p: float) -> float | None:
    """How often they are read, in the mean; None where PyTorch looks for the nucleus."""
    first = chosen.only(torch.zeros(1, dtype=torch.int64, device=chosen.zt_M.device))
    if top_p == 1 or draw.nucleus(first, top_p) is not None:
        return 1.0
    if draw.survey(first) is None:
        return None
    again = []

    def survey(rows: ChosenRows) -> Survey:
        found = draw.survey(rows)

        def bin_tokens(at: Tensor, *bins: Tensor) -> BinTokens:
            again.append(len(at))
            return found.bin_tokens(at, *bins)

        return replace(found, bin_tokens=bin_tokens)

    draw_tokens(draw._replace(survey=survey), chosen, top_p, None)
    return 1 + sum(again) / len(chosen.index_M)


def claims(rows: list[dict]) -> list[dict]:
    """The target on an H100: what the draw reads, at the speed of a pure read, in steps that read many."""
    drawn = [r for r in rows if r["impl"] == "draw" and r["step"] != "t = 1/2" and "moved_gb" in r]
    names = [f"draw at V = {row['vocab']}, {row['dtype']}, {row['step']}: share of a read" for row in drawn]
    return [claim(name, share_of(row, "read"), 0.85) for name, row in zip(names, drawn, strict=True)]


def share_of(row: dict, speed: str) -> float:
    """Of the speed of a "copy" or a "read"."""
    return row["moved_gb"] / row["seconds"] / row[f"{speed}_gb_s"]


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
        "Columns and units as the script explains them; logits of every position are given. floor: the",
        "logits of the rows that `ours` reads, at the speed of a pure read in the same run (`of a read`), by",
        "which `draw` is judged; a copy reads and writes. `reads` counts rows that `surveyed` reads again.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in rows:
        same = [r for r in rows if all(r[name] == row[name] for name in ("vocab", "dtype", "step"))]
        dense = next((r for r in same if r["impl"] == "dense"), None)
        lines.append(line_of(row, dense))
        ours = next((r for r in same if r["impl"] == "ours"), None)
        if row is same[-1] and ours:
            speeds = {name: max(r[name] for r in same if name in r) for name in ("copy_gb_s", "read_gb_s")}
            floor = {"impl": "floor", "seconds": ours["read_gb"] / speeds["read_gb_s"], "peak_mib": 0.0}
            lines.append(line_of(ours | floor | speeds | {"reads": 1, "moved_gb": ours["read_gb"]}, dense))
    return "\n".join(lines) + "\n"


def line_of(row: dict, dense: dict | None) -> str:
    cells = [row["vocab"], row["dtype"], row["step"], row["impl"], f"{row['seconds']:.4f}"]
    cells += [f"{row['peak_mib']:.0f}"]
    cells += [f"{row[name] / dense[name]:.3f}" if dense else "" for name in ("seconds", "peak_mib")]
    cells += [f"{row['reads']:.3f}" if "reads" in row else ""]
    moved = "moved_gb" in row
    cells += [f"{row['moved_gb']:.3f}", f"{share_of(row, 'copy'):.1%}"] if moved else ["", ""]
    cells += [f"{share_of(row, 'read'):.1%}" if moved and "read_gb_s" in row else ""]
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
        if impl != "surveyed" or STEPS[step][2] < 1
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
    table.fill(cases, partial(within_memory, partial(run_case, __file__, args, names, measure)), LATE)


if __name__ == "__main__":
    main()
