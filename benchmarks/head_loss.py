"""Time and peak memory of output head, loss and gradients: fused against the paper's loss on whole logits.

`products` is the floor in time: the three matrix products that every form needs, and nothing else.
`eager` multiplies hidden states and head weight and evaluates the authors' plain loss under autograd
(loss_reference.py). `logits` multiplies likewise and takes vocab_parallel_nelbo, which writes the gradient
over the logits: train.fuse_head=never. `fused` is head_nelbo: train.fuse_head=always. `summed` is the same
with the weight's gradient added to a float32 sum that exists, as under Megatron's data-parallel wrapper,
which the others would do afterwards. Each form runs in a process of its own; memory is the peak above what
the process holds once its inputs exist, the gradients of hidden states and weight included. Seconds are CUDA
events', on a CPU the process's own CPU time (meter.py).

    python benchmarks/head_loss.py --dtypes float32 bfloat16
"""

import argparse
import json
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cases import device_name, spawn, write_results
from loss_reference import DTYPES, plain_nelbo
from meter import baseline_mib, peak_mib, seconds_of
from torch import Tensor
from tqdm import tqdm

from xdlm_megatron.diffusion.head_nelbo import head_nelbo
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import RowOps
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo
from xdlm_megatron.kernels.dispatch import choose_kernels

IMPLS = ("eager", "logits", "fused", "summed", "products")


def make_inputs(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, tuple]:
    """Hidden states, a weight that makes logits of std 2, and tokens corrupted at stratified alphas."""
    torch.manual_seed(0)
    B, S, H, V = args.batch, args.tokens // args.batch, args.hidden, args.vocab
    noise = StationaryNoise(args.uniform_ratio, V, V - 1)
    hidden = torch.randn(B, S, H, device=device).to(DTYPES[args.dtype]).requires_grad_()
    weight = torch.empty(V, H, dtype=DTYPES[args.dtype], device=device)
    weight = weight.normal_(std=2 / H**0.5).requires_grad_()
    t = (torch.arange(B, device=device, dtype=torch.float64) + 0.5) / B
    rates = (1 - 0.999 * t, 0.999 * t, torch.full_like(t, -0.999))
    x0 = torch.randint(0, V - 1, (B, S), device=device)
    counter = (torch.arange(B, device=device)[:, None], torch.arange(S, device=device))
    return hidden, weight, (noise.corrupt(x0, rates[0], (0, 1), counter), x0, *rates, noise)


def run_step(
    impl: str, ops: RowOps, hidden: Tensor, weight: Tensor, rest: tuple, total: Tensor | None
) -> float:
    """Loss and gradients once; returns the sum of the loss. total: `summed`'s sum of weight gradients."""
    if impl == "products":
        with torch.no_grad():
            hidden_NH = hidden.view(-1, hidden.shape[-1])
            logits_NP = hidden_NH @ weight.t()
            _ = logits_NP @ weight, logits_NP.t() @ hidden_NH
        return 0.0  # it has no loss
    if impl == "eager":
        loss = plain_nelbo(hidden @ weight.t(), *rest).sum()
    elif impl == "logits":
        loss = vocab_parallel_nelbo(hidden @ weight.t(), *rest, grad_in_place=True, ops=ops).sum()
    else:
        loss = head_nelbo(hidden, weight, *rest, ops=ops, main_grad_PH=total).sum()
    loss.backward()
    hidden.grad = weight.grad = None
    return loss.item()


def measure(args: argparse.Namespace) -> dict:
    """One form, in this process: the first step gives the memory, the best one the time."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    ops = choose_kernels("auto", device).row_ops

    def inputs_of(sizes: argparse.Namespace) -> tuple:
        hidden, weight, rest = make_inputs(sizes, device)
        total = torch.zeros(weight.shape, device=device) if args.impl == "summed" else None
        return args.impl, ops, hidden, weight, rest, total

    # A tiny step first, so that lazily loaded libraries do not count as the loss's memory.
    run_step(*inputs_of(argparse.Namespace(**vars(args) | {"tokens": args.batch, "vocab": 64})))
    inputs = inputs_of(args)
    baseline, seconds, losses, peaks = baseline_mib(device), [], [], []
    for _ in range(args.repeats):
        seconds.append(seconds_of(lambda: losses.append(run_step(*inputs)), device))
        peaks.append(peak_mib(device))
    return {"seconds": min(seconds), "peak_mib": peaks[0] - baseline, "loss": losses[0]}


def run_case(args: argparse.Namespace, case: dict) -> dict:
    """A result row, from a process of its own."""
    names = ("device", "tokens", "batch", "repeats", "threads", "hidden", "vocab", "uniform_ratio")
    options = {name: getattr(args, name) for name in names}
    if case["impl"] == "eager" and args.device == "cpu":
        options["repeats"] = 1  # gigabytes and a minute a step
    return spawn(__file__, options, case)


def report(args: argparse.Namespace, rows: list[dict]) -> str:
    """The results as Markdown; ratios are to the first form of the same dtype."""
    lines = [
        "# Output head, loss and gradients: fused against the paper's loss on whole logits",
        "",
        f"{device_name(args)}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{args.tokens} tokens in {args.batch} sequences, H = {args.hidden}, V = {args.vocab}, "
        f"uniform_ratio {args.uniform_ratio}, best of {args.repeats} runs (eager on a CPU: one).",
        "",
        f"    {args.command}",
        "",
        "Seconds are CUDA events', on a CPU the process's CPU time; `of products`: the share of the time",
        "that the three bare matrix products take. Memory is the peak above the inputs (hidden states and",
        "weight); both gradients count.",
        "",
        "| dtype | form | seconds | MiB | time ratio | memory ratio | of products |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [r for r in rows if r["dtype"] == row["dtype"]]
        base = same[0]
        floor = next((r["seconds"] for r in same if r["impl"] == "products"), None)
        share = "" if floor is None else f"{floor / row['seconds']:.0%}"
        lines.append(
            f"| {row['dtype']} | {row['impl']} | {row['seconds']:.2f} | {row['peak_mib']:.0f} "
            f"| {row['seconds'] / base['seconds']:.2f} | {row['peak_mib'] / base['peak_mib']:.3f} | {share} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 4096, help="tokens a step")
    parser.add_argument("--batch", type=int, default=8, help="sequences; divides --tokens")
    parser.add_argument(
        "--hidden", type=int, default=4096 if cuda else 512, help="width of the hidden states"
    )
    parser.add_argument("--vocab", type=int, default=131072 if cuda else 126464, help="vocabulary")
    parser.add_argument("--uniform-ratio", type=float, default=0.1, help="k; the plain form needs k > 0")
    parser.add_argument(
        "--repeats", type=int, default=10 if cuda else 3, help="steps a case; the best counts"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--jobs", type=int, default=1, help="forms at once; more than 1 on a busy CPU alone")
    dtypes = ["bfloat16" if cuda else "float32"]
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=dtypes, help="of hidden and weight")
    parser.add_argument(
        "--impls", nargs="+", choices=IMPLS, default=IMPLS, help="the first is the base of ratios"
    )
    parser.add_argument("--out", type=Path, help="folder of the results [benchmarks/results/DEVICE]")
    parser.add_argument("--name", default="head_loss", help="of the results' files")
    parser.add_argument("--measure", action="store_true", help="measure one case here and print it as JSON")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="with --measure")
    parser.add_argument("--impl", choices=IMPLS, default="fused", help="with --measure")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    args.command = " ".join(["python", "benchmarks/head_loss.py", *sys.argv[1:]])
    cases = [{"dtype": dtype, "impl": impl} for dtype in args.dtypes for impl in args.impls]
    with ThreadPoolExecutor(args.jobs) as pool:
        measured = pool.map(lambda case: run_case(args, case), cases)
        rows = list(tqdm(measured, total=len(cases), desc="head and loss", unit="case"))
    for row in rows:
        if row["impl"] != "products" and abs(row["loss"] - rows[0]["loss"]) > 2e-3 * abs(rows[0]["loss"]):
            raise RuntimeError(
                f"{row} and {rows[0]} disagree on the loss: the timings compare different things"
            )
    machine = {name: getattr(args, name) for name in ("tokens", "hidden", "vocab")}
    write_results(
        args, args.name, report(args, rows), machine, {"uniform_ratio": args.uniform_ratio, "rows": rows}
    )


if __name__ == "__main__":
    main()
