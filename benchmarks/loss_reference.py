"""Time and peak memory of the loss and its gradient, against the paper's loss in plain PyTorch.

The plain form is the one the authors' code evaluates (arXiv 2602.01362, Eq. 15): a float32 softmax over the
whole vocabulary, two gathers, and the mean over all V entries of log(V alpha p_e + beta k), under autograd.
Ours is vocab_parallel_nelbo on one rank. Each measurement runs in its own process; memory is the peak above
what the process holds once its inputs exist. Seconds are CUDA events', on a CPU the process's own CPU time.

    python benchmarks/loss_reference.py --tokens 512 --repeats 10
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from cases import device_name, spawn, write_results
from meter import baseline_mib, peak_mib, seconds_of
from torch import Tensor
from tqdm import tqdm

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMPLS = ("plain", "ours", "in place")
VOCABULARIES = (32000, 126464)
UNIFORM_RATIO = 0.1


def plain_nelbo(
    logits: Tensor,
    zt: Tensor,
    x0: Tensor,
    alpha: Tensor,
    beta: Tensor,
    dalpha: Tensor,
    noise: StationaryNoise,
) -> Tensor:
    """The paper's printed form, [B, S]; every name with an f is V times the marginal's probability."""
    k, V, mask_id = noise.uniform_ratio, noise.vocab_size, noise.mask_id
    alpha, beta, dalpha = (rate[:, None].float() for rate in (alpha, beta, dalpha))
    logits = logits.float()
    logits = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
    p = logits.softmax(-1)
    p_x, p_z = (p.gather(-1, ids[..., None])[..., 0] for ids in (x0, zt))
    noise_z = k + V * (1 - k) * (zt == mask_id)
    f_xz, f_pz = V * alpha * (zt == x0) + beta * noise_z, V * alpha * p_z + beta * noise_z
    f_xx, f_px = V * alpha + beta * k, V * alpha * p_x + beta * k
    mean_log_x = (V - 1) / V * (beta * k).log() + f_xx.log() / V
    mean_log_p = (V * alpha[..., None] * p + beta[..., None] * k).log().mean(-1)
    h = V * ((zt == x0).float() - p_z) / f_pz - (f_xz / f_pz).log() / alpha
    h = h + (f_xx / f_px).log() + beta * k / alpha * (mean_log_x - mean_log_p)
    return -dalpha * noise_z / f_xz * h


def make_inputs(args: argparse.Namespace, device: torch.device) -> tuple:
    """Logits of std 2, tokens corrupted at stratified alphas."""
    torch.manual_seed(0)
    B, S, V = args.batch, args.tokens // args.batch, args.vocab
    noise = StationaryNoise(UNIFORM_RATIO, V, V - 1)
    logits = torch.empty(B, S, V, dtype=DTYPES[args.dtype], device=device)
    for row in logits.view(-1, V):  # a row at a time: no float32 peak before the baseline
        row.copy_(torch.randn(V, device=device) * 2)
    t = (torch.arange(B, device=device, dtype=torch.float64) + 0.5) / B
    rates = (1 - 0.999 * t, 0.999 * t, torch.full_like(t, -0.999))
    x0 = torch.randint(0, V - 1, (B, S), device=device)
    counter = (torch.arange(B, device=device)[:, None], torch.arange(S, device=device))
    return logits, noise.corrupt(x0, rates[0], (0, 1), counter), x0, *rates, noise


def run_step(impl: str, logits: Tensor, rest: tuple) -> Tensor:
    """Loss and gradient once; returns the sum of the loss."""
    leaf = logits.detach().requires_grad_()
    if impl == "plain":
        loss = plain_nelbo(leaf, *rest).sum()
    else:
        loss = vocab_parallel_nelbo(leaf, *rest, grad_in_place=impl == "in place").sum()
    loss.backward()
    return loss.detach()


def measure(args: argparse.Namespace) -> dict:
    """One case, in this process: the first step gives the memory, the others the time."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    # A tiny step first, so that lazily loaded libraries do not count as the loss's memory.
    tiny, *tiny_rest = make_inputs(argparse.Namespace(batch=1, tokens=2, vocab=64, dtype=args.dtype), device)
    run_step(args.impl, tiny, tiny_rest)
    logits, *rest = make_inputs(args, device)
    kept = logits.clone()
    baseline = baseline_mib(device)
    loss = run_step(args.impl, logits, rest)
    peak, seconds = peak_mib(device), []
    for _ in range(args.repeats):
        logits.copy_(kept)  # the gradient may have been written over them
        seconds.append(seconds_of(lambda: run_step(args.impl, logits, rest), device))
    return {"seconds": min(seconds), "peak_mib": peak - baseline, "loss": loss.item()}


def plain_twin(row: dict, rows: list[dict]) -> dict:
    """The plain form's row for the same logits."""
    return next(
        r for r in rows if (r["vocab"], r["dtype"], r["impl"]) == (row["vocab"], row["dtype"], "plain")
    )


def report(args: argparse.Namespace, rows: list[dict]) -> str:
    """The results as Markdown; ratios are ours / plain."""
    lines = [
        "# Loss and gradient: ours against the paper's form in plain PyTorch",
        "",
        f"{device_name(args)}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{args.tokens} tokens in {args.batch} sequences, uniform_ratio {UNIFORM_RATIO}, "
        f"best of {args.repeats} runs.",
        "",
        f"    {args.command}",
        "",
        "Memory is the peak above the inputs (the logits are an input). `in place` writes the gradient over",
        "the logits, as training does; `ours` allocates it. Seconds are CUDA events', on a CPU the process's",
        "own CPU time.",
        "",
        "| V | logits | loss | seconds | MiB | time ratio | memory ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, mib, base = row["seconds"], row["peak_mib"], plain_twin(row, rows)
        lines.append(
            f"| {row['vocab']} | {row['dtype']} | {row['impl']} | {seconds:.3f} | {mib:.0f} "
            f"| {seconds / base['seconds']:.2f} | {mib / base['peak_mib']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step")
    parser.add_argument("--batch", type=int, default=4, help="sequences; divides --tokens")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps a case; the best counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, help="folder of the results [benchmarks/results/DEVICE]")
    parser.add_argument("--measure", action="store_true", help="measure one case here and print it as JSON")
    parser.add_argument("--vocab", type=int, default=32000, help="with --measure")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="with --measure")
    parser.add_argument("--impl", choices=IMPLS, default="plain", help="with --measure")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    args.command = " ".join(["python", "benchmarks/loss_reference.py", *sys.argv[1:]])
    cases = [
        {"vocab": vocab, "dtype": dtype, "impl": impl}
        for vocab in VOCABULARIES
        for dtype in DTYPES
        for impl in IMPLS
    ]
    names = ("device", "tokens", "batch", "repeats", "threads")
    options = {name: getattr(args, name) for name in names}
    rows = [spawn(__file__, options, case) for case in tqdm(cases, desc="loss", unit="case")]
    for row in rows:
        twin = plain_twin(row, rows)
        if abs(row["loss"] - twin["loss"]) > 1e-3 * abs(twin["loss"]):
            raise RuntimeError(f"{row} and {twin} disagree on the loss: the timings compare different things")
    write_results(
        args,
        "loss_reference",
        report(args, rows),
        {"tokens": args.tokens},
        {"uniform_ratio": UNIFORM_RATIO, "rows": rows},
    )


if __name__ == "__main__":
    main()
