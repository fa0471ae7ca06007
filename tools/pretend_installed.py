"""Makes this Python's environment look as if it had packages, so that pip resolves as if it had.

    python tools/pretend_installed.py [FREEZE.txt] [NAME==VERSION ...]

Only names and versions are written, no package: for a scratch environment. Later ones win; what is no
NAME==VERSION (an editable install, say) is skipped.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;]+)")


def read_pins(arguments: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Normalised name -> (name, version)."""
    lines: list[str] = []
    for argument in arguments:
        lines += [argument] if PINNED.match(argument) else Path(argument).read_text().splitlines()
    found = [match.groups() for line in lines if (match := PINNED.match(line.strip()))]
    return {re.sub(r"[-_.]+", "_", name).lower(): (name, version) for name, version in found}


def main() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    for normalised, (name, version) in read_pins(sys.argv[1:]).items():
        if list(packages.glob(f"{normalised}-*.dist-info")):
            continue  # the environment's own, pip among them
        folder = packages / f"{normalised}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "INSTALLER").write_text("pretend_installed\n")
        (folder / "RECORD").write_text("")


if __name__ == "__main__":
    main()
