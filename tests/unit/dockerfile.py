"""Reads a Dockerfile, and carries out a stage of it without Docker: in a throw-away overlay of this machine.

The overlay's lower layer is this machine's root in the place of the stage's base image, so that what a stage
changes is gone with the namespace it ran in. `python` is the tests' own. Needs root and overlayfs.
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


def as_script(stage: Stage, context: Path, arguments: dict[str, str], skip: Callable[[str], bool]) -> str:
    """The stage as a bash script for the inside of the overlay; RUN lines that `skip` names are left out.

    COPY of another stage is left out too. The health check comes last, as the user of the stage.
    """
    lines = ["set -euo pipefail", f"export PATH={shlex.quote(sys.prefix)}/bin:$PATH HOME=/root"]
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
    (folder / "stage.sh").write_text(script)
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
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
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
