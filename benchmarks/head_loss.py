"""Time and peak memory of output head, loss and gradients: fused against the paper's loss on whole logits.

eager     hidden states times head weight, and the authors' plain loss under autograd (loss_reference.py)
compiled  torch.compile of it
liger     Liger's fused linear cross-entropy, the nearest public kernel (a simpler loss), where it is
logits    the product, and vocab_parallel_nelbo, which writes the gradient over it: train.fuse_head=never
fused     head_nelbo: train.fuse_head=always
summed    the same with the weight's gradient added to a float32 sum that exists, as under Megatron's
          data-parallel wrapper, which the others would do afterwards
products  the floor: the three matrix products that every form needs, and nothing else

`GB moved` is what a step's operators read and write, as if there were no cache, and the passes of our row
operations over the logits; what a compiler or Liger makes is not counted. `of copy` is the time that copying
as many bytes takes in the same process, over the time it took: low where a form computes rather than moves.
Memory is the peak above what is held once the inputs exist, the gradients of hidden states and weight
included. Seconds are CUDA events', on a CPU the process's own CPU time (meter.py); there every form runs in a
process of its own.

    python benchmarks/head_loss.py --dtypes float32 bfloat16
"""

import argparse
import contextlib
import importlib
import json
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from cases import Table, claim, device_name, is_target, run_case, split_impls, within_memory
from loss_reference import DTYPES, plain_nelbo
from meter import CountBytes, baseline_mib, best_seconds, peak_mib, seconds_of
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from xdlm_megatron.diffusion.head_nelbo import head_nelbo
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import RowOps
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo
from xdlm_megatron.kernels.dispatch import choose_kernels

IMPLS = ("eager", "compiled", "liger", "logits", "fused", "summed", "products")
LATE = ("eager", "liger", "compiled")  # after what targets are of
NEED_GPU = {"liger": "Triton kernels"}
NO_XDLM_LOSS = ("liger", "products")
NOT_COUNTED = ("compiled", "liger")
Loss = Callable[..., Tensor]


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


def liger(hidden: Tensor, weight: Tensor, zt: Tensor, x0: Tensor, *rates: object) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden.view(-1, hidden.shape[-1]), weight, x0.view(-1))


def eager(hidden: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return plain_nelbo(hidden @ weight.t(), *rest).sum()


def build_loss(impl: str, ops: RowOps, total: Tensor | None) -> Loss:
    """(hidden states, weight, the loss's other arguments) -> the sum of the loss. total: `summed`'s sum of
    weight gradients.
    """
    if impl in ("eager", "compiled"):
        return eager if impl == "eager" else torch.compile(eager, dynamic=False)
    if impl == "liger":
        return liger
    if impl == "logits":
        return lambda hidden, weight, *rest: vocab_parallel_nelbo(
            hidden @ weight.t(), *rest, grad_in_place=True, ops=ops
        ).sum()
    return lambda *inputs: head_nelbo(*inputs, ops=ops, main_grad_PH=total).sum()


def run_step(loss_of: Loss, hidden: Tensor, weight: Tensor, rest: tuple) -> float:
    """Loss and gradients once; returns the sum of the loss."""
    loss = loss_of(hidden, weight, *rest)
    loss.backward()
    hidden.grad = weight.grad = None
    return loss.item()


@torch.no_grad()
def run_products(hidden: Tensor, weight: Tensor, _: tuple) -> float:
    """A step of `products`, which has no loss."""
    hidden_NH = hidden.view(-1, hidden.shape[-1])
    logits_NP = hidden_NH @ weight.t()
    _ = logits_NP @ weight, logits_NP.t() @ hidden_NH
    return 0.0


def uncounted(ops: RowOps) -> RowOps:
    """The same, hidden from CountBytes: the PyTorch ones work in a cache, the CUDA ones are no operators."""

    def hide(function: Callable | None) -> Callable | None:
        def hidden(*args: object, **kwargs: object) -> object:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return function and hidden

    return RowOps(*map(hide, ops))


def bytes_of_rows(args: argparse.Namespace, ops: RowOps, zt: Tensor) -> int:
    """What row operations move: each pass reads, or writes, the logits of the tokens that have a loss."""
    if args.impl not in ("logits", "fused", "summed"):
        return 0
    tokens = args.tokens if args.uniform_ratio > 0 else int((zt == args.vocab - 1).sum())
    passes = 2 if ops.whole else 4 if args.uniform_ratio > 0 else 3
    return passes * tokens * args.vocab * DTYPES[args.dtype].itemsize


def measure(args: argparse.Namespace) -> dict:
    """One form: the first step gives memory and bytes, the best one the time."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    ops = uncounted(choose_kernels("cuda" if args.device == "cuda" else "auto", device).row_ops)

    def step_of(hidden: Tensor, weight: Tensor, rest: tuple) -> Callable[[], float]:
        total = torch.zeros(weight.shape, device=device) if args.impl == "summed" else None
        if args.impl == "products":
            return lambda: run_products(hidden, weight, rest)
        loss_of = build_loss(args.impl, ops, total)
        return lambda: run_step(loss_of, hidden, weight, rest)

    # A tiny step first, so that lazily loaded libraries do not count as the loss's memory.
    step_of(*make_inputs(argparse.Namespace(**vars(args) | {"tokens": args.batch, "vocab": 64}), device))()
    hidden, weight, rest = make_inputs(args, device)
    step = step_of(hidden, weight, rest)
    counted = args.impl not in NOT_COUNTED
    if args.impl == "compiled":
        step()  # compiles for this size
    baseline, seconds, losses = baseline_mib(device), [], []
    with CountBytes() if counted else contextlib.nullcontext() as count:
        seconds.append(seconds_of(lambda: losses.append(step()), device))
    peak = peak_mib(device)
    for _ in range(args.repeats - 1):
        seconds.append(seconds_of(lambda: losses.append(step()), device))
    result = {"seconds": min(seconds), "peak_mib": peak - baseline, "loss": losses[0]}
    source = torch.zeros(min(64 << 20, args.tokens * args.vocab), device=device)  # 256 MiB: beyond any cache
    target = torch.ones_like(source)
    copy_seconds = best_seconds(lambda: target.copy_(source), 3, device)
    result["copy_gb_per_second"] = 2 * source.numel() * source.element_size() / copy_seconds / 1e9
    if counted:
        result["moved_gb"] = (count.total + bytes_of_rows(args, ops, rest[0])) / 1e9
        result["share_of_copy"] = result["moved_gb"] / result["copy_gb_per_second"] / min(seconds)
    return result


def measure_case(args: argparse.Namespace, case: dict) -> dict:
    """A result row."""
    names = ("device", "tokens", "batch", "repeats", "threads", "hidden", "vocab", "uniform_ratio")
    if case["impl"] == "eager" and args.device == "cpu":
        args = argparse.Namespace(**vars(args) | {"repeats": 1})  # gigabytes and a minute a step
    return run_case(__file__, args, names, measure, case)


def check_losses(rows: list[dict]) -> None:
    """Raises RuntimeError where two forms have another loss."""
    for row in (r for r in rows if r["impl"] not in NO_XDLM_LOSS):
        base = next(r for r in rows if r["impl"] not in NO_XDLM_LOSS)
        if abs(row["loss"] - base["loss"]) > 2e-3 * abs(base["loss"]):
            raise RuntimeError(f"{row} and {base} disagree on the loss: the timings compare different things")


def claims(rows: list[dict]) -> list[dict]:
    """The targets on an H100, of the form that training runs: the gradient is added to a sum that exists."""
    seconds = {row["impl"]: row["seconds"] for row in rows if row["dtype"] == "bfloat16"}
    summed = next((r for r in rows if (r["impl"], r["dtype"]) == ("summed", "bfloat16")), None)
    if summed is None:
        return []
    gigabytes = summed["peak_mib"] * 2**20 / 1e9
    found = [claim("summed: memory beyond its inputs", gigabytes, 0.4, " GB", at_most=True)]
    if "products" in seconds:
        share = seconds["products"] / summed["seconds"]
        found.append(claim("summed: share of it that the three bare products take", share, 1 / 1.1))
    return found


def report(args: argparse.Namespace, rows: list[dict], left_out: dict[str, str]) -> str:
    """The results as Markdown; ratios are to the first form of the same dtype."""
    check_losses(rows)
    lines = [
        "# Output head, loss and gradients: fused against the paper's loss on whole logits",
        "",
        f"{device_name(args)}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{args.tokens} tokens in {args.batch} sequences, H = {args.hidden}, V = {args.vocab}, "
        f"uniform_ratio {args.uniform_ratio}, best of {args.repeats} runs (eager on a CPU: one).",
        "",
        f"    {args.command}",
        "",
        "Columns and units as the script explains them; `of products`: the share of the time that the three",
        "bare matrix products, the floor, take.",
        "",
        "| dtype | form | seconds | MiB | time ratio | memory ratio | of products | GB moved | of copy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [r for r in rows if r["dtype"] == row["dtype"]]
        base = next((r for r in same if r["impl"] == args.impls[0]), None)
        floor = next((r["seconds"] for r in same if r["impl"] == "products"), None)
        cells = [row["dtype"], row["impl"], f"{row['seconds']:.2f}", f"{row['peak_mib']:.0f}"]
        cells += [f"{row[name] / base[name]:.3f}" if base else "" for name in ("seconds", "peak_mib")]
        cells += ["" if floor is None else f"{floor / row['seconds']:.0%}"]
        known = "moved_gb" in row
        cells += [f"{row['moved_gb']:.1f}", f"{row['share_of_copy']:.0%}"] if known else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"{impl}: not measured, {reason}." for impl, reason in left_out.items())]
    return "\n".join(lines).rstrip() + "\n"


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
    args.impls, left_out = split_impls(args, NEED_GPU, lambda _: importlib.import_module("liger_kernel"))
    cases = [{"dtype": dtype, "impl": impl} for dtype in args.dtypes for impl in args.impls]
    table = Table(
        args,
        args.name,
        lambda rows: report(args, rows, left_out),
        {name: getattr(args, name) for name in ("tokens", "hidden", "vocab")},
        {"uniform_ratio": args.uniform_ratio, "left_out": left_out},
        lambda rows: claims(rows) if is_target(args) else [],
    )
    one = partial(measure_case, args)
    if args.device == "cuda":
        table.fill(cases, partial(within_memory, one), LATE)
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        table.fill(cases, partial(pool.map, one), LATE)


if __name__ == "__main__":
    main()
