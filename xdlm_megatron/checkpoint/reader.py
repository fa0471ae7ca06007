"""Which checkpoint a run goes on from, checked before it is read, and its contents under any layout.

checkpoints/
  latest              name of the newest whole checkpoint
  step_00000500/      Megatron's torch_dist format, and manifest.json (integrity.py)
  step_00001000.tmp/  being written or removed, or left by an interruption; never read
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

from xdlm_megatron.checkpoint.integrity import MANIFEST, CheckpointError, find_damage, newest_whole
from xdlm_megatron.parallel.mesh import Mesh

LATEST = "latest"
_NAME = re.compile(r"step_(\d{8,})")
_NO_OTHER = "no older one beside it is whole; put the file back from a copy, or train again"


def load_checkpoint(path: Path, state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Fills `state` (sharded tensors of this layout) from the checkpoint; plain values come with it.

    Each data-parallel replica reads a part of the files and sends it to the others. Scales of FP8 that the
    checkpoint lacks, as one in bfloat16 does, are left out.
    """
    state = _without_absent_scales(path, state)
    strategy = get_default_load_sharded_strategy(str(path))
    replicas = mesh.groups.dp_cp
    if replicas.size() > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, replicas)
    return dist_checkpointing.load(state, str(path), strategy)


def _without_absent_scales(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    def is_scales(value: Any) -> bool:
        return isinstance(value, ShardedObject) and value.key.endswith("_extra_state")

    if not any(map(is_scales, nested_values(state))):
        return state
    there = {value.key for value in load_sharded_metadata(str(path)).values()}
    return extract_matching_values(state, lambda v: not is_scales(v) or v.key in there)[0]


def load_plain_values(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, such as the train state, without its tensors."""
    return dist_checkpointing.load_common_state_dict(str(path))


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint folder's name tells."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(
            f"{path} is not a checkpoint; its name must be step_ and the step, as in step_00001000"
        )
    return int(match[1])


def find_latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, None where nothing was saved yet.

    Raises:
        CheckpointError: `latest` cannot be read, or names a checkpoint that is gone.
    """
    path = _read_latest(folder)
    if path is not None and not path.is_dir():
        raise CheckpointError(
            f"{folder / LATEST} names {path.name}, which is not there (there: {_names(folder)}); "
            "correct the file"
        )
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether this folder is one, and not a folder of them."""
    return (path / "metadata.json").is_file()


def find_checkpoint(path: Path) -> Path | None:
    """`path`, if it is a checkpoint; else the latest of the checkpoints in it, None where there is none."""
    return path if is_checkpoint(path) else find_latest(path)


def _read_latest(folder: Path) -> Path | None:
    pointer = folder / LATEST
    try:
        name = pointer.read_bytes().decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(
            f"{pointer} cannot be read ({error.strerror}); correct its permissions, or make it a file with "
            "the name of the checkpoint to go on from"
        ) from error
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{pointer} says {name[:40]!r}, which is no checkpoint's name; write into it the one to go on "
            f"from (there: {_names(folder)})"
        )
    return folder / name


def _names(folder: Path) -> str:
    return ", ".join(path.name for path in list_checkpoints(folder)) or "none"


def check_whole(path: Path, mesh: Mesh) -> None:
    """Compares a checkpoint with its manifest, on the main process; all processes call it.

    Raises:
        CheckpointError: a file is missing, cut short or changed; on every process.
    """
    mesh.on_main(lambda: _refuse_damaged(path, "to use it, give it by --checkpoint"), CheckpointError)


def choose_start(folder: Path, mesh: Mesh, allow_fallback: bool) -> Path | None:
    """The checkpoint to go on from: `latest`, checked; with `allow_fallback` the newest whole one up to it.

    All processes call it; the main process reads the files. None where nothing was saved yet. A run that was
    killed between the publication of its first checkpoint and `latest` goes on from that one.

    Raises:
        CheckpointError: the checkpoint, or `latest` beside several, is gone or damaged; on every process.
    """

    def choose() -> Path | None:
        latest = _read_latest(folder) if allow_fallback else find_latest(folder)
        if latest is None:
            latest = _only_one(folder)
        if latest is None:
            return None
        if not allow_fallback:
            return _refuse_damaged(latest, "to go on from it, add --allow-fallback")
        damage = find_damage(latest)
        if damage is None:
            return latest
        whole = newest_whole(_before(latest))
        if whole is None:
            raise CheckpointError(f"{latest} is damaged: {damage}; {_NO_OTHER}")
        print(f"{latest} is damaged: {damage}; goes on from {whole.name}, --allow-fallback", flush=True)
        return whole

    return mesh.on_main(choose, CheckpointError)


def _only_one(folder: Path) -> Path | None:
    """The one checkpoint of a folder without `latest`, None where there is none. Several are refused."""
    found = list_checkpoints(folder)
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} has no '{LATEST}' and several checkpoints ({', '.join(path.name for path in found)}); "
            f"write the name of the one to go on from into {folder / LATEST}"
        )
    for path in found:
        print(f"{folder} has no '{LATEST}'; goes on from its only checkpoint, {path.name}", flush=True)
    return found[0] if found else None


def _refuse_damaged(path: Path, cure: str) -> Path:
    damage = find_damage(path)
    if damage is None:
        return path
    whole = newest_whole(_before(path))
    other = _NO_OTHER if whole is None else f"the newest whole one before it is {whole}; {cure}"
    if damage.startswith(MANIFEST):
        other += f" (files known to be good: python tools/inspect_checkpoint.py {path} --write-manifest)"
    raise CheckpointError(f"{path} is damaged: {damage}; {other}")


def _before(path: Path) -> list[Path]:
    """The checkpoints of earlier steps beside this one, newest first; none for a folder of another name."""
    if not _NAME.fullmatch(path.name):
        return []
    return [other for other in reversed(list_checkpoints(path.parent)) if step_of(other) < step_of(path)]
