"""Whether a checkpoint is still the one that was written: a manifest with the size and checksum of each file.

{"checksum": "blake2b-128", "files": {".metadata": {"bytes": 101439, "checksum": "0f3a..."}, ...}}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

MANIFEST = "manifest.json"
CHECKSUM = "blake2b-128"

# About 1 GB/s a core; the files are read once more, mostly from the page cache. A model of one billion
# parameters (18 GB with optimizer and averages) takes some 20 s on one core, 3 s on eight. Threads do:
# hashlib lets go of the interpreter's lock.
_MAX_THREADS = 8


class CheckpointError(ValueError):
    """A checkpoint that is not there or cannot be used; the message names it and the cure."""


def describe(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int | str]]:
    """The manifest's entries of these files."""
    names = list(names)
    with ThreadPoolExecutor(_num_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: _describe(folder / name), names), strict=True))


def write_manifest(folder: Path, known: Mapping[str, dict[str, int | str]] = MappingProxyType({})) -> None:
    """Records every file of the folder as it is now; the entries in `known` were made by their writers."""
    names = [name for name in _file_names(folder) if name != MANIFEST]
    made = describe(folder, (name for name in names if name not in known))
    files = {name: known.get(name) or made[name] for name in names}
    (folder / MANIFEST).write_text(json.dumps({"checksum": CHECKSUM, "files": files}, indent=1) + "\n")


def fingerprint(folder: Path) -> str | None:
    """blake2b-128 of the manifest, hexadecimal: stands for all of a checkpoint's bytes. None without one."""
    try:
        return hashlib.blake2b((folder / MANIFEST).read_bytes(), digest_size=16).hexdigest()
    except FileNotFoundError:
        return None


def find_damage(folder: Path) -> str | None:
    """The first file that is not as the manifest says, as "file: what is wrong"; None for a whole checkpoint.

    Names and sizes come first, because they cost nothing; then the checksums, all of them at once.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = {str(name): (int(e["bytes"]), str(e["checksum"])) for name, e in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST}: is missing"
    except OSError as error:
        return _unreadable(MANIFEST, error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST}: is damaged itself"
    if manifest.get("checksum") != CHECKSUM:
        return f"{MANIFEST}: has checksums of kind {manifest.get('checksum')!r} and not {CHECKSUM!r}"
    for name, (size, _) in files.items():
        try:
            if not (folder / name).is_file():
                return f"{name}: is missing"
            found = (folder / name).stat().st_size
        except OSError as error:
            return _unreadable(name, error)
        if found != size:
            change = "cut short" if found < size else "longer than written"
            return f"{name}: is {change}, {found} bytes instead of {size}"
    with ThreadPoolExecutor(_num_threads()) as pool:
        found_damages = pool.map(lambda name: _compare(folder, name, files[name][1]), files)
        return next(filter(None, found_damages), None)


def _compare(folder: Path, name: str, checksum: str) -> str | None:
    try:
        changed = _checksum(folder / name) != checksum
    except OSError as error:
        return _unreadable(name, error)
    return f"{name}: has changed since it was written (checksum)" if changed else None


def _unreadable(name: str, error: OSError) -> str:
    return f"{name}: cannot be read ({error.strerror or error})"


def newest_whole(newest_first: Iterable[Path]) -> Path | None:
    """The first of these checkpoints without damage."""
    return next((path for path in newest_first if find_damage(path) is None), None)


def _file_names(folder: Path) -> list[str]:
    """Paths of all files below the folder, relative to it, in a fixed order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "checksum": _checksum(path)}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _num_threads() -> int:
    return min(_MAX_THREADS, os.cpu_count() or 1)
