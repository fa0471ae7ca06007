"""A real Slurm on this machine: slurmctld and several slurmd of Debian's packages, no systemd, no cgroups.

    with MiniSlurm(folder, num_nodes=2) as slurm:
        slurm.run("sinfo")

Everything that it writes lies in its folder, ports are free ones, and only its own processes are stopped.
Each node has a hostname and an /etc/hosts of its own (Linux namespaces), where node1, node2, ... are loopback
addresses. Nodes claim more CPUs and GPUs than there are, so that production headers are accepted; the GPUs
are null devices.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
PACKAGES = ("slurm-wlm", "munge")
KILL_WAIT_SECONDS = 5
NODE_TIMEOUT_SECONDS = 30  # a node that does not answer is down by then; a loaded machine is slow to answer

CONFIGURATION = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=50000,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout={node_timeout}
KillWait={kill_wait}
JobRequeue=1
MinJobAge=86400
GresTypes=gpu
"""


def missing_programs() -> list[str]:
    """What a mini Slurm needs and this machine lacks, root and the right to make namespaces included."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0:
        missing.append("root")
    elif shutil.which("unshare") and subprocess.run(["unshare", "--uts", "--mount", "true"]).returncode:
        missing.append("the right to make namespaces")
    return missing


class MiniSlurm:
    """See above. environment: what a user's shell needs to reach it."""

    def __init__(self, folder: Path, num_nodes: int, gpus: int = 8) -> None:
        self.folder, self.num_nodes, self.gpus = folder, num_nodes, gpus
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "etc/slurm.conf")}
        self._closing = ExitStack()

    def __enter__(self) -> MiniSlurm:
        with ExitStack() as stack:
            for name in ("etc", "run", "log", "state", "spool", "gpu"):
                (self.folder / name).mkdir(parents=True)
            self._configure()
            stack.callback(self._stop)
            self._start()
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def run(self, *command: str, timeout: float = 60) -> str:
        """A Slurm command's output; fails with what it said."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm tells of a job: JobState, ExitCode, Restarts, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: str, holds: Callable[[dict[str, str]], bool], seconds: float) -> dict[str, str]:
        """Waits until `holds(job)`; has a requeued job start at once, where Slurm would wait two minutes."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.job(job_id)
            if holds(job):
                return job
            assert time.monotonic() < deadline, f"job {job_id} after {seconds} s: {job}"
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime" and job["Restarts"] != "0":
                self._kick(job_id, job["SubmitTime"])
            time.sleep(0.5)

    def start_node(self, name: str) -> None:
        script = 'hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts && exec slurmd -f "$3" -N "$1"'
        self.run(
            *("unshare", "--uts", "--mount", "bash", "-ec", script, "slurmd"),
            *(name, str(self.folder), self.environment["SLURM_CONF"]),
        )

    def kill_node(self, name: str) -> None:
        """SIGKILL to every process of the node, slurmd and the jobs' included: as if its power were cut."""
        slurmd = (self.folder / f"run/slurmd-{name}.pid").read_text().strip()
        node = os.readlink(f"/proc/{slurmd}/ns/uts")
        for _ in range(2):  # once more: what was just being forked
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if os.readlink(process / "ns/uts") == node:
                        os.kill(int(process.name), signal.SIGKILL)

    def _kick(self, job_id: str, submitted: str) -> None:
        """Not in the second of the requeue: that start dies of "Job credential revoked"."""
        if time.time() - time.mktime(time.strptime(submitted, "%Y-%m-%dT%H:%M:%S")) >= 3:
            command = ["scontrol", "update", f"JobId={job_id}", "StartTime=now"]
            subprocess.run(command, env=self.environment, capture_output=True, check=False)

    def _configure(self) -> None:
        etc, host = self.folder / "etc", socket.gethostname().split(".")[0]
        port = _free_ports(self.num_nodes + 1)
        waits = {"kill_wait": KILL_WAIT_SECONDS, "node_timeout": NODE_TIMEOUT_SECONDS}
        lines = [CONFIGURATION.format(host=host, port=port, folder=self.folder, **waits)]
        hosts = Path("/etc/hosts").read_text()
        for index in range(1, self.num_nodes + 1):
            lines.append(
                f"NodeName=node{index} NodeHostname=node{index} NodeAddr=127.0.0.1 Port={port + index} "
                f"CPUs=256 Gres=gpu:{self.gpus}"
            )
            hosts += f"127.{port // 256}.{port % 256}.{index} node{index}\n"  # no other cluster's here
            (self.folder / f"spool/node{index}").mkdir()
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (etc / "slurm.conf").write_text("\n".join(lines) + "\n")
        (etc / "hosts").write_text(hosts)
        for index in range(self.gpus):
            os.mknod(self.folder / f"gpu/gpu{index}", 0o20666, os.makedev(1, 3))
        devices = f"{self.folder}/gpu/gpu[0-{self.gpus - 1}]"
        (etc / "gres.conf").write_text(f"AutoDetect=off\nName=gpu Flags=nvidia_gpu_env File={devices}\n")
        (etc / "munge.key").write_bytes(os.urandom(1024))
        (etc / "munge.key").chmod(0o400)

    def _start(self) -> None:
        run, log = self.folder / "run", self.folder / "log"
        munge = {
            "key-file": self.folder / "etc/munge.key",
            "socket": run / "munge.sock",
            "pid-file": run / "munged.pid",
            "log-file": log / "munged.log",
            "seed-file": run / "munged.seed",
        }
        self.run("munged", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        self.run("slurmctld", "-f", self.environment["SLURM_CONF"])
        for index in range(1, self.num_nodes + 1):
            self.start_node(f"node{index}")
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-N", "-o", "%t").split() != ["idle"] * self.num_nodes:
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-l")
            time.sleep(0.2)

    def _stop(self) -> None:
        """Jobs first: their processes would outlive slurmd."""
        with suppress(AssertionError, subprocess.TimeoutExpired, FileNotFoundError):
            self.run("scancel", "--full", "--user=root")
            deadline = time.monotonic() + 2 * KILL_WAIT_SECONDS
            while self.run("squeue", "-h", "-t", "R,CG") and time.monotonic() < deadline:
                time.sleep(0.2)
        pid_files = [*self.folder.glob("run/slurmd-*.pid"), self.folder / "run/slurmctld.pid"]
        for path in [*pid_files, self.folder / "run/munged.pid"]:
            if path.exists():
                _end(int(path.read_text()))


def _end(pid: int, seconds: float = 10) -> None:
    """SIGTERM, and SIGKILL if that is not enough."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while _lives(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        if _lives(pid):
            os.kill(pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports, none that slurm/processes.sh takes.

    At random, so that two clusters that start at once differ.
    """
    firsts = list(range(30000, 32700, count))
    random.shuffle(firsts)
    for first in firsts:
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")
