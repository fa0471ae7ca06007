"""Some steps of the 160M recipe in bfloat16 and in FP8, from one checkpoint, on the same noised batches.

The first run trains in bfloat16, saves, and goes on; the second one loads that state and trains on in FP8. In
a rehearsal the second run is like the first, so that the two must agree to the last bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gpu_parts.findings import ChildError, Findings, part_parser, run_child
from gpu_parts.training import FLOAT32, FP8, open_run, prepare
from xdlm_megatron.checkpoint.reader import find_latest
from xdlm_megatron.checkpoint.writer import CheckpointWriter
from xdlm_megatron.train.run import CHECKPOINTS
from xdlm_megatron.train.state import TrainState

BEFORE, COMPARED = 10, 50  # steps
TINY_BEFORE, TINY_COMPARED = 2, 3
TOLERANCE = 0.005  # relative, of every step's loss


def measure(recipe: list[str], load: Path | None, before: int, compared: int) -> None:
    """Trains and prints a line a step. load: begin with this checkpoint; without it, write one in between."""
    with open_run(recipe) as (_, run):
        state = TrainState()
        if load is not None:
            state = run.load(load)
        while state.step < before + compared:
            result = run.step(state)
            nelbo, tokens = run.mesh.reduce_sum(result.nelbo).tolist()
            line = {"step": state.step, "loss": nelbo / tokens, "grad_norm": result.grad_norm}
            print(json.dumps(line), flush=True)
            if load is None and state.step == before:
                CheckpointWriter(run.folder / CHECKPOINTS, run.mesh, keep_last=1).save(
                    state.step, run.state_to_save(state)
                )


def main() -> None:
    parser = part_parser(__doc__)
    parser.add_argument("--measure", nargs="+", metavar="RECIPE", help="train one recipe here")
    parser.add_argument("--load", type=Path, help="with --measure: the checkpoint to begin with")
    args = parser.parse_args()
    before, compared = (TINY_BEFORE, TINY_COMPARED) if args.tiny else (BEFORE, COMPARED)
    if args.measure:
        measure(args.measure, args.load, before, compared)
        return
    found = Findings(args.out, "losses", "160M from one checkpoint in bfloat16 and FP8")
    names = ("float32", "float32 again") if args.tiny else ("bfloat16", "FP8")
    size = [] if args.tiny else ["train.global_batch_size=64"]
    size += ["lr_schedule.warmup_steps=20"]  # so that the loss moves within these steps
    first = prepare(
        args.out, "losses", "xdlm_160m.yaml", args.tiny, [*size, *([FLOAT32] if args.tiny else [])]
    )
    second = first if args.tiny else [*first, FP8]
    folder = args.out / "losses_run"
    shutil.rmtree(folder, ignore_errors=True)
    options = ["-m", "gpu_parts.losses", "--out", str(args.out), *(["--tiny"] if args.tiny else [])]
    losses: dict[int, float] = {}
    worst = 0.0

    def compare(line: dict) -> None:
        nonlocal worst
        step, loss = line["step"], line["loss"]
        difference = loss / losses[step] - 1
        worst = max(worst, abs(difference))
        cells = {names[0]: f"{losses[step]:.5f}", names[1]: f"{loss:.5f}", "difference": f"{difference:+.2e}"}
        found.row("Loss a step, nats a token", step=step, **cells)

    def remember(line: dict) -> None:
        losses[line["step"]] = line["loss"]
        found.fact(**{names[0]: losses})

    try:
        run_child([*options, "--measure", *first], remember)
        checkpoint = find_latest(folder / CHECKPOINTS)
        run_child([*options, "--load", str(checkpoint), "--measure", *second], compare)
    except ChildError as error:
        raise SystemExit(
            f"error: {names[1] if len(losses) == before + compared else names[0]}: {error}"
        ) from None
    limit = 0.0 if args.tiny else TOLERANCE
    text = f"largest difference {worst:.3%} in {compared} steps"
    if not found.claim(f"{names[1]} against {names[0]}, loss", text, f"within {limit:.1%}", worst <= limit):
        raise SystemExit(f"error: {text}, more than {limit:.1%}")


if __name__ == "__main__":
    main()
