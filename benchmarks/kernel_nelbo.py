"""The loss and its gradient from logits: our kernels and their PyTorch twin beside other ways, and the floor.

eager     the paper's form in plain PyTorch under autograd (loss_reference.py)
compiled  torch.compile of it
liger     Liger's fused cross-entropy, the nearest public kernel (a simpler loss); where it is installed
twin      vocab_parallel_nelbo on its PyTorch row operations, gradient in place
split     the same on our kernels, as several ranks use them: each of the passes reads the logits
whole     the same on our kernels where one rank has the vocabulary: one read, one write

Every way gets the same logits. `bytes` is what it moves a logit: counted over its operators for eager (what
they read and write; no cache holds it), its passes over the logits for the others (the twin's scratch stays
in a cache), unknown for what a compiler makes. `of copy` is the time that copying that many bytes takes on
this device, measured in the same run, over the time it took. The floor is one read and one write. Memory is
the peak above the inputs, the logits among them. Seconds are CUDA events', on a CPU the process's CPU time.

    python benchmarks/kernel_nelbo.py                       # a GPU: all of it, minutes
    python benchmarks/kernel_nelbo.py --vocab 32768 131072  # a CPU: the twin beside eager
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cases import Table, claim, device_name, is_target, run_case, split_impls, within_memory
from loss_reference import DTYPES, make_inputs, plain_nelbo
from meter import CountBytes, baseline_mib, peak_mib, seconds_of
from torch import Tensor

from xdlm_megatron.diffusion.row_ops import REFERENCE, RowOps
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo
from xdlm_megatron.kernels.dispatch import choose_kernels

IMPLS = ("eager", "compiled", "liger", "twin", "split", "whole")
PASSES = {
    "liger": 3,
    "twin": 4,
    "split": 4,
    "whole": 2,
}  # over the logits, the write of the gradient among them
LATE = ("eager", "twin", "liger", "compiled")  # first what targets are of; eager is what one is compared with
NEED_GPU = {"liger": "Triton kernels", "split": "CUDA kernels", "whole": "CUDA kernels"}
Step = Callable[[Tensor, tuple], Tensor]


def in_place(ops: RowOps) -> Step:
    """vocab_parallel_nelbo as training calls it."""
    return lambda leaf, rest: vocab_parallel_nelbo(leaf, *rest, grad_in_place=True, ops=ops).sum()


def build_step(impl: str, device: torch.device) -> Step:
    """(logits, the loss's other arguments) -> the sum of the loss. Raises ImportError without Liger."""
    if impl == "eager":
        return lambda leaf, rest: plain_nelbo(leaf, *rest).sum()
    if impl == "compiled":
        compiled = torch.compile(plain_nelbo, dynamic=False)
        return lambda leaf, rest: compiled(leaf, *rest).sum()
    if impl == "liger":
        from liger_kernel.transformers.functional import liger_cross_entropy

        return lambda leaf, rest: liger_cross_entropy(leaf.view(-1, leaf.shape[-1]), rest[1].view(-1))
    if impl == "twin":
        return in_place(REFERENCE)
    kernels = choose_kernels("cuda", device).row_ops
    return in_place(kernels if impl == "whole" else kernels._replace(whole=None, rescale=None))


def bytes_per_logit(impl: str, step: Step, args: argparse.Namespace, device: torch.device) -> float | None:
    """Of passes, or counted on a few rows of eager; None of what is compiled."""
    if impl in PASSES:
        return DTYPES[args.dtype].itemsize * PASSES[impl]
    if impl != "eager":
        return None
    few = argparse.Namespace(**vars(args) | {"tokens": 2 * args.batch})
    logits, *rest = make_inputs(few, device)
    with CountBytes() as count:
        run_step(step, logits, tuple(rest))
    return count.total / logits.numel()


def run_step(step: Step, logits: Tensor, rest: tuple) -> Tensor:
    """Loss and gradient once."""
    loss = step(logits.detach().requires_grad_(), rest)
    loss.backward()
    return loss.detach()


def measure(args: argparse.Namespace) -> dict:
    """One case: the first step gives the memory, the others the time, the best of them."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    step = build_step(args.impl, device)
    per_logit = bytes_per_logit(args.impl, step, args, device)
    # A step first: what is loaded or compiled at the first use is not the loss's memory. It is a small one,
    # but for torch.compile, which compiles for one size.
    few = {} if args.impl == "compiled" else {"tokens": args.batch}
    first, *first_rest = make_inputs(argparse.Namespace(**vars(args) | few), device)
    run_step(step, first, tuple(first_rest))
    del first
    logits, *rest = make_inputs(args, device)
    kept = logits.clone()
    baseline = baseline_mib(device)
    loss = run_step(step, logits, tuple(rest))
    peak = peak_mib(device)
    seconds, copies = [], []
    for _ in range(args.repeats):
        copies.append(seconds_of(lambda: logits.copy_(kept), device))  # the gradient may lie over the logits
        seconds.append(seconds_of(lambda: run_step(step, logits, tuple(rest)), device))
    size = logits.numel() * logits.element_size()
    result = {"seconds": min(seconds), "peak_mib": peak - baseline, "loss": loss.item()}
    result |= {"logits_mib": size / 2**20, "copy_gb_per_second": 2 * size / min(copies) / 1e9}
    if per_logit is not None:
        moved = per_logit * logits.numel()
        result |= {
            "bytes_per_logit": per_logit,
            "share_of_copy": moved / (2 * size) * min(copies) / min(seconds),
        }
    return result


def eager_of(row: dict, rows: list[dict]) -> dict | None:
    """Of the same logits; None where it is not measured.

    Raises RuntimeError where the two are of different losses.
    """
    same = (r for r in rows if all(r[name] == row[name] for name in ("vocab", "dtype")))
    eager = next((r for r in same if r["impl"] == "eager"), None)
    if eager and row["impl"] != "liger" and abs(row["loss"] - eager["loss"]) > 2e-3 * abs(eager["loss"]):
        raise RuntimeError(f"{row} and {eager} disagree on the loss: the timings compare different things")
    return eager


def claims(rows: list[dict]) -> list[dict]:
    """The targets on an H100, at V = 131072 in bfloat16."""
    found = []
    for row in (r for r in rows if (r["vocab"], r["dtype"]) == (131072, "bfloat16")):
        if row["impl"] in ("split", "whole"):
            found.append(claim(f"{row['impl']}: share of a copy of its bytes", row["share_of_copy"], 0.85))
            extra = row["peak_mib"] / row["logits_mib"]
            found.append(claim(f"{row['impl']}: memory beside the logits", extra, 0.01, at_most=True))
        if row["impl"] == "whole" and (eager := eager_of(row, rows)):
            found.append(claim("whole: faster than eager", eager["seconds"] / row["seconds"], 15, "x"))
    return found


def report(args: argparse.Namespace, rows: list[dict], left_out: dict[str, str]) -> str:
    lines = [
        "# Loss and gradient from logits: kernels, twin, eager, and the floor",
        "",
        f"{device_name(args)}, torch {torch.__version__}, Python {platform.python_version()}; {args.tokens} "
        f"tokens in {args.batch} sequences, uniform_ratio 0.1, best of {args.repeats} runs.",
        "",
        f"    {args.command}",
        "",
        "Columns and units as the script explains them; `x eager` is how many times faster than eager.",
        "",
        "| V | logits | way | ms | x eager | bytes a logit | of copy | MiB above inputs | of the logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [r for r in rows if (r["vocab"], r["dtype"]) == (row["vocab"], row["dtype"])]
        eager = eager_of(row, rows)
        known = "bytes_per_logit" in row
        cells = [row["vocab"], row["dtype"], row["impl"], f"{1e3 * row['seconds']:.2f}"]
        cells += [
            f"{eager['seconds'] / row['seconds']:.2f}" if eager else "",
            f"{row['bytes_per_logit']:.1f}" if known else "",
        ]
        cells += [f"{100 * row['share_of_copy']:.0f} %" if known else "", f"{row['peak_mib']:.0f}"]
        cells += [f"{100 * row['peak_mib'] / row['logits_mib']:.1f} %"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        if row is same[-1]:
            floor = 2 * row["logits_mib"] * 2**20 / max(r["copy_gb_per_second"] for r in same) / 1e6
            bytes_floor = 2 * DTYPES[row["dtype"]].itemsize
            cells = [row["vocab"], row["dtype"], "floor", f"{floor:.2f}"]
            cells += [f"{1e3 * eager['seconds'] / floor:.2f}" if eager else ""]
            cells += [f"{bytes_floor:.1f}", "100 %", "0", "0.0 %"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *(f"{impl}: not measured, {reason}." for impl, reason in left_out.items())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 512, help="tokens a step")
    parser.add_argument("--batch", type=int, default=8, help="sequences; divides --tokens")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5, help="timed steps; the best counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 50304, 131072])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of the logits")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS), help="ways to measure")
    parser.add_argument("--out", type=Path, help="folder of the results [benchmarks/results/DEVICE]")
    parser.add_argument("--measure", action="store_true", help="measure one case here and print it as JSON")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="with --measure")
    parser.add_argument("--impl", choices=IMPLS, default="twin", help="with --measure")
    args = parser.parse_args()
    if args.measure:
        args.vocab = args.vocab[0]
        print(json.dumps(measure(args)))
        return
    args.command = " ".join(["python", "benchmarks/kernel_nelbo.py", *sys.argv[1:]])
    if "eager" not in args.impls:
        parser.error("--impls must have eager among them: the others are compared with it")
    impls, left_out = split_impls(args, NEED_GPU, lambda impl: build_step(impl, torch.device(args.device)))
    cases = [{"vocab": v, "dtype": d, "impl": i} for v in args.vocab for d in args.dtypes for i in impls]
    names = ("device", "tokens", "batch", "repeats", "threads")
    machine = {"tokens": args.tokens, "threads": args.threads}
    table = Table(
        args,
        "kernel_nelbo",
        lambda rows: report(args, rows, left_out),
        machine,
        {"left_out": left_out},
        lambda rows: claims(rows) if is_target(args) else [],
    )
    table.fill(cases, partial(within_memory, partial(run_case, __file__, args, names, measure)), LATE)


if __name__ == "__main__":
    main()
