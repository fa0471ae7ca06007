"""A process that has imported torch and Megatron once and forks the ranks of every run from itself.

    python -m tests.distributed.zygote SOCKET [MODULE]

imports the module, if one is named, before Megatron; prints "ready" and serves until its standard input ends.
A connection is a run: the client sends one line, a JSON object (launch.py makes it); a supervisor, forked for
it, answers {"pids": [...]} and, once all ranks have ended, {"codes": [...]} (negative: the signal that ended
the rank). As under torchrun, each rank has a session of its own, and where one ends badly the others get
SIGTERM after a moment and SIGKILL after a while.
A client that goes away ends its run; a zygote or a supervisor that dies takes its ranks with it.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MODULE = "xdlm_megatron.__main__"
SECONDS_ALONE = 2.0  # for the others to end by themselves, as they do where all meet the same error
SECONDS_TO_END = 12.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.005
NEVER = float("inf")
_PR_SET_PDEATHSIG = 1


def serve(path: str) -> None:
    import torch._dynamo  # optimizers import it when they are built
    import torch.distributed.checkpoint  # noqa: F401

    import xdlm_megatron.evaluation.run
    import xdlm_megatron.train.run  # noqa: F401

    gc.collect()
    gc.freeze()  # a rank's collections need not visit, and so copy, what all ranks share
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork takes one thread along: nothing imported here may start another"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(16)
        print("ready", flush=True)
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    server.close()
                    _supervise(connection)
                    os._exit(0)
            _reap()


def _supervise(connection: socket.socket) -> None:
    _die_with_parent()
    line = b""
    while not line.endswith(b"\n"):
        received = connection.recv(65536)
        if not received:
            return
        line += received
    request = json.loads(line)
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    size = request["num_processes"]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            connection.close()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            _be_rank(request, {**request["environment"], **world, **place})
        pids.append(pid)
    _tell(connection, {"pids": pids})
    codes = _wait_for(pids, connection)
    _tell(connection, {"codes": [codes[pid] for pid in pids]})


def _tell(connection: socket.socket, message: dict[str, list[int]]) -> None:
    with suppress(BrokenPipeError):  # the client has left
        connection.sendall(json.dumps(message).encode() + b"\n")


def _wait_for(pids: list[int], connection: socket.socket) -> dict[int, int]:
    """The exit code of every rank, once all have ended."""
    codes: dict[int, int] = {}
    end_at = kill_at = NEVER
    while len(codes) < len(pids):
        for pid, code in _reap():
            codes[pid] = code
            if code and end_at == NEVER:
                end_at = time.monotonic() + SECONDS_ALONE
        if select.select([connection], [], [], POLL_SECONDS)[0]:
            kill_at = 0.0  # the client has left
        if time.monotonic() > end_at and kill_at == NEVER:
            kill_at = time.monotonic() + SECONDS_TO_END
            _signal(set(pids) - codes.keys(), signal.SIGTERM)
        if time.monotonic() > kill_at:
            _signal(set(pids) - codes.keys(), signal.SIGKILL)
            time.sleep(POLL_SECONDS)
    return codes


def _be_rank(request: dict, environment: dict[str, str]) -> None:
    """Runs the program as `python PROGRAM ARGUMENTS` would, and ends the process."""
    code = 1
    try:
        os.setsid()
        _die_with_parent()
        os.environ.clear()
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(request["folder"])
        atexit._clear()  # type: ignore[attr-defined]
        program = request["program"]
        sys.argv = [program, *request["arguments"]]
        try:
            if program == MODULE:
                runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(program, run_name="__main__")
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        else:
            code = 0
        atexit._run_exitfuncs()  # type: ignore[attr-defined]
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _reap() -> Iterator[tuple[int, int]]:
    """(process, exit code) of the children that have ended."""
    ended = []
    with suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append((child[0], os.waitstatus_to_exitcode(child[1])))
    return iter(ended)


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    """Below the ports that the system hands out by itself, so that no connection of a run takes it, and
    below those of slurm/processes.sh.
    """
    first = 10_000 + os.getpid() * 7 % 9_000
    for port in range(first, 20_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port from {first} on")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    serve(sys.argv[1])
