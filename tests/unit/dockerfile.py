"""Reads a Dockerfile, and carries out a stage of it without Docker, in one of two places.

An overlay: this machine's root, copied on write, in the place of the stage's base image; what a stage changes
is gone with the namespace it ran in. `python` is the tests' own. Needs root and overlayfs.

A prefix: a folder, under which the image's own paths are taken to lie. Needs no rights: apt-get says what it
would install, and nobody is made a user. `python` is that of a new virtual environment in it, which sees the
tests' packages.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Instruction = tuple[str, str]  # RUN, "pip install ."


@dataclass
class Stage:
    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, *kinds: str) -> list[str]:
        return [value for kind, value in self.instructions if kind in kinds]


def read_dockerfile(path: Path) -> tuple[dict[str, str], dict[str, Stage]]:
    """(ARG before the first stage, stages by name)."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in lines:
        kind, value = line.split(maxsplit=1)
        if kind == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()
            stages[name] = Stage(base, name)
        elif not stages:
            arguments.update([value.split("=", 1)])
        else:
            list(stages.values())[-1].instructions.append((kind, value))
    return arguments, stages


def copy_context(root: Path, target: Path) -> None:
    """What Docker would send of the folder: all but what .dockerignore names."""
    patterns = [
        line for line in (root / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")
    ]

    def ignored(folder: str, names: list[str]) -> set[str]:
        def is_ignored(name: str) -> bool:
            path = (Path(folder) / name).relative_to(root)
            return any(
                fnmatch.fnmatch(path.name, pattern.removeprefix("**/"))
                if pattern.startswith("**/")
                else fnmatch.fnmatch(str(path), pattern)
                for pattern in patterns
            )

        return {name for name in names if is_ignored(name)}

    shutil.copytree(root, target, ignore=ignored, symlinks=True)


# Folders that the Dockerfile makes or writes to, as it names them.
_OF_THE_IMAGE = re.compile(r"(?<![\w./}-])/(?=(src|opt|wheels|xdlm|home/xdlm|var/lib/apt)\b)")
_WITHOUT_RIGHTS = {
    "useradd": 'mkdir -p "$PREFIX/home/xdlm"',
    "install": 'mkdir -p "${@: -1}"',
    "chown": "true",
    "setpriv": 'while [[ $1 != env ]]; do shift; done; exec "$@"',
}


def in_prefix(text: str, prefix: Path) -> str:
    """With the image's paths under `prefix`."""
    return _OF_THE_IMAGE.sub(f"{prefix}/", text)


def as_script(stage: Stage, context: Path, arguments: dict[str, str], skip: Callable[[str], bool]) -> str:
    """The stage as a bash script; RUN lines that `skip` names are left out.

    COPY of another stage is left out too. The health check comes last, as the user of the stage.
    """
    lines = ["set -euo pipefail"]
    user, check = "", ""
    for kind, value in stage.instructions:
        run = f"setpriv --reuid {user} --regid {user} --clear-groups env HOME=/home/xdlm " if user else ""
        if kind == "ARG":
            name, default = value.split("=", 1)
            lines.append(f"export {name}={shlex.quote(arguments[name]) if name in arguments else default}")
        elif kind == "ENV":
            lines.append(f"export {value}")
        elif kind == "WORKDIR":
            lines.append(f"mkdir -p {value}; cd {value}")
        elif kind == "USER":
            user = value
        elif kind == "COPY" and "--from" not in value:
            owner, sources, target = re.fullmatch(r"(?:--chown=(\w+) )?(.+) (\S+)", value).groups()
            for source in sources.split():
                name = target if not target.endswith("/") else f"{target}{source}"
                lines.append(f'mkdir -p "$(dirname {name})"; cp -a {context}/{source} {name}')
                lines.append(f"chown -R {owner or 'root'} {name}")
        elif kind == "RUN" and not skip(value):
            lines.append(f"echo {shlex.quote('RUN ' + value[:60])}; {run}bash -c {shlex.quote(value)}")
        elif kind == "HEALTHCHECK":
            check = run + shlex.join(json.loads(value[value.index("CMD") + 3 :]))
    return "\n".join([*lines, check]) + "\n"


def run_in_overlay(script: str, folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs a script as root in a copy-on-write view of this machine, of which nothing stays."""
    paths = f"export PATH={shlex.quote(sys.prefix)}/bin:$PATH HOME=/root\n"
    (folder / "stage.sh").write_text(paths + script)
    (folder / "root").mkdir()
    outer = f"""set -euo pipefail
cd {folder}; mount -t tmpfs tmpfs root; mkdir root/upper root/work root/all
mount -t overlay overlay -o lowerdir=/,upperdir=root/upper,workdir=root/work root/all
for name in proc dev sys; do mount --rbind /$name root/all/$name; done
cp -a {folder}/stage.sh root/all/stage.sh
for path in {shlex.quote(sys.prefix)} {shlex.quote(sys.base_prefix)}; do  # a base image's can be read by all
  while [[ $path != / ]]; do chmod a+rx root/all$path; path=$(dirname $path); done
done
mkdir -p root/all{folder}/context; mount --bind {folder}/context root/all{folder}/context
exec chroot root/all bash /stage.sh
"""
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", outer]
    return _run(command, timeout, _environment())


def make_prefix(folder: Path) -> Path:
    """A prefix in `folder`: what would need rights has a stand-in, apt-get simulates."""
    prefix = folder / "prefix"
    new_environment(prefix / "python")
    (prefix / "bin").mkdir()
    for name, does in _WITHOUT_RIGHTS.items():
        (prefix / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (prefix / "bin" / name).chmod(0o755)
    for name in ("var/lib/apt/lists/partial", "var/cache/apt/archives/partial", "tmp", "root"):
        (prefix / name).mkdir(parents=True)
    state = f'Dir::State::lists "{prefix}/var/lib/apt/lists"; Dir::Cache "{prefix}/var/cache/apt"; '
    (prefix / "apt.conf").write_text(state + 'APT::Get::Simulate "true"; APT::Sandbox::User "";\n')
    return prefix


def new_environment(folder: Path) -> None:
    """A virtual environment that sees the tests' packages, pip and torch among them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))


def run_in_prefix(
    script: str, prefix: Path, timeout: float, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script as who we are, without a capability; the image's paths in it lie in the prefix."""
    environment = _environment() | {
        "PATH": f"{prefix}/bin:{prefix}/python/bin:{os.environ['PATH']}",
        "PREFIX": str(prefix),
        "HOME": f"{prefix}/root",
        "TMPDIR": f"{prefix}/tmp",
        "APT_CONFIG": f"{prefix}/apt.conf",
        **variables,
    }
    powerless = ["/usr/bin/setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    bash = ["bash", "-c", in_prefix(script, prefix)]
    return _run([*powerless, *bash] if os.geteuid() == 0 else bash, timeout, environment)


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _run(command: list[str], timeout: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, env=environment
    )


def overlay_works() -> bool:
    """Whether this process may mount an overlay."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    trial = "mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w /mnt/a && mount -t overlay o /mnt/a -o "
    trial += "lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w"
    return subprocess.run(["unshare", "--mount", "bash", "-c", trial], capture_output=True).returncode == 0
