"""Do the processes of a job reach each other? All-reduces of growing size, checked and timed.

    torchrun --nproc-per-node 2 tools/check_collectives.py --seconds 60

Starts from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; NCCL where a GPU is, gloo elsewhere.
The first process prints a line a size: time, and bus bandwidth as nccl-tests counts it, 2 (n - 1) / n bytes a
second. Ends with 1 and the numbers of the processes that did not answer where some are missing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import socket
import sys
import time

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # no stack traces of C++: we say it in a line

import torch
import torch.distributed as dist

REPEATS = 5
SIZES = (1 << 10, 1 << 20, 1 << 24, 1 << 28)  # bytes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="to wait for every process (default: 120)"
    )
    parser.add_argument("--max-bytes", type=int, help="largest message (default: 2^28, on a CPU 2^20)")
    options = parser.parse_args()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        store = meet(rank, world_size, options.seconds)
        missing = absent(store, rank, world_size, options.seconds)
    except (dist.DistError, RuntimeError) as error:
        print(f"check_collectives: error: process {rank} on {socket.gethostname()}: {error}", file=sys.stderr)
        return 1
    if missing:
        if rank == 0:
            print(f"check_collectives: error: no answer from process {missing}", file=sys.stderr)
        return 1
    return measure(store, rank, world_size, options)


def meet(rank: int, world_size: int, seconds: float) -> dist.TCPStore:
    """The store that every process reaches, or an error within `seconds`."""
    store = dist.TCPStore(
        os.environ.get("MASTER_ADDR", "localhost"),
        int(os.environ.get("MASTER_PORT", "29500")),
        world_size,
        is_master=rank == 0 and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE"),  # torchrun serves one
        timeout=datetime.timedelta(seconds=seconds),
        wait_for_workers=False,
    )
    store.set(f"host/{rank}", socket.gethostname())
    return store


def absent(store: dist.TCPStore, rank: int, world_size: int, seconds: float) -> str:
    """The processes that did not come, as "3, 4": the first one waits for them, the others for its word, and
    it for those: the store ends with it.
    """
    if rank == 0:
        here: list[bool] = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            here = [store.check([f"host/{other}"]) for other in range(world_size)]
            if all(here):
                break
            time.sleep(0.1)
        missing = ", ".join(str(other) for other, came in enumerate(here) if not came)
        store.set("missing", missing)
        for told in (f"told/{other}" for other, came in enumerate(here) if came and other):
            store.wait([told], datetime.timedelta(seconds=seconds))
        return missing
    store.wait(["missing"], datetime.timedelta(seconds=2 * seconds))
    missing = store.get("missing").decode()
    store.set(f"told/{rank}", "")
    return missing


def measure(store: dist.TCPStore, rank: int, world_size: int, options: argparse.Namespace) -> int:
    """All-reduces of every size; 1 where a sum is wrong."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=options.seconds)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    largest = options.max_bytes or (SIZES[-1] if cuda else 1 << 20)
    right = True
    for size in (size for size in SIZES if size <= largest):
        seconds, sums_right = all_reduce(size // 4, rank, world_size, device)
        right &= sums_right
        if rank == 0:
            bus = 2 * (world_size - 1) / world_size * size / seconds / 1e9
            print(
                f"all-reduce of {size:>11,} bytes: {seconds * 1e3:9.3f} ms, bus {bus:8.2f} GB/s", flush=True
            )
    if rank == 0:
        hosts = {store.get(f"host/{other}").decode() for other in range(world_size)}
        print(f"{world_size} processes on {', '.join(sorted(hosts))}: {'good' if right else 'WRONG SUMS'}")
    dist.destroy_process_group()
    return 0 if right else 1


def all_reduce(count: int, rank: int, world_size: int, device: torch.device) -> tuple[float, bool]:
    """(seconds, best of a few; whether the sum was right) for `count` float32 numbers."""
    best, expected = float("inf"), world_size * (world_size + 1) / 2
    for _ in range(REPEATS):
        values = torch.full((count,), float(rank + 1), device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        right = bool((values == expected).all())  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best, right


if __name__ == "__main__":
    sys.exit(main())
