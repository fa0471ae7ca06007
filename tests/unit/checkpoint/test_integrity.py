"""A checkpoint that is not what was written is refused; the newest whole one is used on demand alone."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xdlm_megatron.checkpoint import integrity
from xdlm_megatron.checkpoint.integrity import MANIFEST, find_damage, newest_whole, write_manifest
from xdlm_megatron.checkpoint.reader import CheckpointError, check_whole, choose_start
from xdlm_megatron.checkpoint.writer import CheckpointWriter
from xdlm_megatron.parallel.mesh import Mesh


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    (Path.unlink, "{name}: is missing"),
    (cut_short, "{name}: is cut short, {less} bytes instead of {size}"),
    (append, "{name}: is longer than written, {more} bytes instead of {size}"),
    (flip_bit, "{name}: has changed since it was written (checksum)"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some files, an empty one and one in a folder among them, and their manifest."""
    made = tmp_path / "step_00000001"
    (made / "inner").mkdir(parents=True)
    for name, content in (
        (".metadata", b"abc"),
        ("big", bytes(3_000_000)),
        ("inner/x", b"12"),
        ("none", b""),
    ):
        (made / name).write_bytes(content)
    write_manifest(made)
    return made


def test_the_manifest_names_every_file_once(folder: Path) -> None:
    assert find_damage(folder) is None
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        ".metadata": 3,
        "big": 3_000_000,
        "inner/x": 2,
        "none": 0,
    }
    # BLAKE2b with 16 bytes of digest, as `b2sum -l 128` prints it for the empty file.
    assert manifest["files"]["none"]["checksum"] == "cae66941d9efbd404e4d88758ea67670"
    before = (folder / MANIFEST).read_bytes()
    write_manifest(folder)
    assert (folder / MANIFEST).read_bytes() == before, "the manifest does not list itself"


@pytest.mark.parametrize("name", [".metadata", "big", "inner/x"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_damage_is_found(folder: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    size = (folder / name).stat().st_size
    damage(folder / name)
    assert find_damage(folder) == message.format(name=name, size=size, less=size - 1, more=size + 1)


def test_sizes_are_compared_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(folder / "none")
    monkeypatch.setattr(integrity, "_checksum", lambda path: pytest.fail("read a file"))
    assert find_damage(folder) == "none: is longer than written, 1 bytes instead of 0"


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize(
    ("name", "call"), [(MANIFEST, "read_bytes"), ("big", "open"), ("inner/x", "is_file"), ("inner/x", "stat")]
)
def test_what_cannot_be_read_is_damage(
    folder: Path, name: str, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_read(folder / name, call, number, monkeypatch)
    assert find_damage(folder) == f"{name}: cannot be read ({os.strerror(number)})"


def fail_to_read(path: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a bad disk: root may read what it likes, so that permissions alone show nothing."""
    works = getattr(Path, call)

    def fails(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise OSError(number, os.strerror(number), str(path))
        return works(self, *arguments, **options)

    monkeypatch.setattr(Path, call, fails)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"", "is damaged itself"),
        (b'{"checksum": "blake2b-128", "files": {"big"', "is damaged itself"),
        (b"[]", "is damaged itself"),
        (b'{"checksum": "blake2b-128", "files": {"big": {"bytes": 3}}}', "is damaged itself"),
        (b'{"checksum": "md5", "files": {}}', "has checksums of kind 'md5' and not 'blake2b-128'"),
    ],
)
def test_a_bad_manifest_is_damage(folder: Path, content: bytes | None, message: str) -> None:
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_bytes(content)
    assert find_damage(folder) == f"{MANIFEST}: {message}"


def test_newest_whole_takes_the_first_without_damage(tmp_path: Path, folder: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    flip_bit(damaged / "big")
    assert newest_whole([damaged, folder]) == folder
    assert newest_whole([damaged]) is None
    assert newest_whole([]) is None


@pytest.fixture
def checkpoints(tmp_path: Path, mesh: Mesh) -> Path:
    """Steps 5, 10 and 15 by Megatron's writer; `latest` is 15."""
    for step in (5, 10, 15):
        CheckpointWriter(tmp_path, mesh, 3).save(step, {"train_state": {"step": step}})
    return tmp_path


def test_without_latest_the_only_checkpoint_is_chosen_aloud(
    checkpoints: Path, mesh: Mesh, capsys: pytest.CaptureFixture
) -> None:
    """As after a kill between the rename of the first checkpoint and `latest`. Of several none is guessed."""
    (checkpoints / "latest").unlink()
    for allow_fallback in (False, True):
        with pytest.raises(CheckpointError, match=r"no 'latest' and several .*\(step_00000005, .*15\)"):
            choose_start(checkpoints, mesh, allow_fallback)
    for step in (5, 10):
        shutil.rmtree(checkpoints / f"step_{step:08d}")
    (checkpoints / "step_00000020.tmp").mkdir()
    assert choose_start(checkpoints, mesh, False) == checkpoints / "step_00000015"
    assert "has no 'latest'; goes on from its only checkpoint, step_00000015" in capsys.readouterr().out
    flip_bit(checkpoints / "step_00000015/common.pt")
    with pytest.raises(CheckpointError, match=r"step_00000015 is damaged: common.pt"):
        choose_start(checkpoints, mesh, False)
    shutil.rmtree(checkpoints / "step_00000015")
    assert choose_start(checkpoints, mesh, False) is None


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_whole_checkpoint_is_chosen(checkpoints: Path, mesh: Mesh, capsys: pytest.CaptureFixture) -> None:
    for allow_fallback in (False, True):
        assert choose_start(checkpoints, mesh, allow_fallback) == checkpoints / "step_00000015"
        assert choose_start(checkpoints / "none", mesh, allow_fallback) is None
    check_whole(checkpoints / "step_00000005", mesh)
    assert capsys.readouterr().out == ""


def test_an_unreadable_one_is_refused_or_passed_over(
    checkpoints: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_read(checkpoints / "step_00000015/common.pt", "open", errno.EIO, monkeypatch)
    with pytest.raises(CheckpointError, match=r"common.pt: cannot be read \(Input/output error\)"):
        choose_start(checkpoints, mesh, False)
    assert choose_start(checkpoints, mesh, True) == checkpoints / "step_00000010"


def test_a_damaged_one_is_refused_with_the_newest_whole_one(checkpoints: Path, mesh: Mesh) -> None:
    flip_bit(checkpoints / "step_00000015/common.pt")
    cut_short(checkpoints / "step_00000010/common.pt")
    start = re.escape(f"{checkpoints}/step_00000015 is damaged: common.pt: has changed since it was written")
    whole = re.escape(f"the newest whole one before it is {checkpoints}/step_00000005")
    with pytest.raises(CheckpointError, match=rf"^{start}.*; {whole}; .*add --allow-fallback$"):
        choose_start(checkpoints, mesh, False)
    with pytest.raises(CheckpointError, match=rf"^{start}.*; {whole}; .*give it by --checkpoint$"):
        check_whole(checkpoints / "step_00000015", mesh)


def test_stepping_back_says_so_and_moves_nothing(
    checkpoints: Path, mesh: Mesh, capsys: pytest.CaptureFixture
) -> None:
    flip_bit(checkpoints / "step_00000015/common.pt")
    before = tree(checkpoints)
    assert choose_start(checkpoints, mesh, True) == checkpoints / "step_00000010"
    (line,) = capsys.readouterr().out.splitlines()
    assert "step_00000015 is damaged: common.pt: has changed" in line
    assert "goes on from step_00000010" in line
    assert tree(checkpoints) == before


def test_a_latest_that_is_gone_is_stepped_over(checkpoints: Path, mesh: Mesh) -> None:
    shutil.rmtree(checkpoints / "step_00000010")
    (checkpoints / "latest").write_text("step_00000010\n")
    with pytest.raises(CheckpointError, match="names step_00000010, which is not there"):
        choose_start(checkpoints, mesh, False)
    # 15 is of a branch that was left by setting `latest` back.
    assert choose_start(checkpoints, mesh, True) == checkpoints / "step_00000005"


@pytest.mark.parametrize("allow_fallback", [False, True])
def test_nothing_whole_is_refused(checkpoints: Path, mesh: Mesh, allow_fallback: bool) -> None:
    for path in checkpoints.glob("step_*/common.pt"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match=r"common.pt: is missing; no older one .* is whole; put the file"
    ):
        choose_start(checkpoints, mesh, allow_fallback)


def test_a_checkpoint_without_a_manifest_can_be_vouched_for(checkpoints: Path, mesh: Mesh) -> None:
    copy = checkpoints.parent / "best"
    shutil.copytree(checkpoints / "step_00000010", copy)
    check_whole(copy, mesh)
    (copy / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json: is missing; no older .*--write-manifest\)$"):
        check_whole(copy, mesh)
    write_manifest(copy)
    check_whole(copy, mesh)


def test_tensors_are_protected_too(tmp_path: Path, mesh: Mesh) -> None:
    """Megatron's reader does not notice a changed byte of a tensor."""
    from megatron.core.dist_checkpointing import ShardedTensor

    weight = torch.arange(4096, dtype=torch.float32)
    path = CheckpointWriter(tmp_path, mesh, 1).save(1, {"w": ShardedTensor.from_rank_offsets("w", weight)})
    (file,) = (f for f in path.glob("*.distcp") if f.stat().st_size > 4 * 4096)
    flip_bit(file)
    with pytest.raises(CheckpointError, match=re.escape(f"{file.name}: has changed")):
        choose_start(tmp_path, mesh, False)
