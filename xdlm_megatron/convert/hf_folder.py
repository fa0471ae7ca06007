"""A Hugging Face folder: config.json and *.safetensors, read lazily, written in shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xdlm_megatron.convert.hf_config import ConvertError
from xdlm_megatron.convert.names import Part

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5_000_000_000  # Hugging Face's own default; what is held in memory while it is written


class HfFolder:
    """The tensors of a folder by name. Files are mapped: a tensor costs memory while it is read."""

    def __init__(self, path: Path) -> None:
        """Raises ConvertError where the folder is not whole."""
        self.path = path
        if not path.is_dir():
            raise ConvertError(f"{path}: no such folder; download the model there, with its config.json")
        self.config: dict[str, Any] = _read_json(path / CONFIG)
        if (path / INDEX).is_file():
            names = set(_read_json(path / INDEX).get("weight_map", {}).values())
        else:
            names = {file.name for file in path.glob("*.safetensors")}
        if not names:
            raise ConvertError(f"{path}: no *.safetensors; other formats of weights are not read")
        missing = sorted(name for name in names if not (path / name).is_file())
        if missing:
            raise ConvertError(f"{path}: {', '.join(missing)} missing, as {INDEX} says; download them too")
        self._files = {}
        for name in sorted(names):
            file = _open(path / name)
            self._files |= dict.fromkeys(file.keys(), file)

    def check(self, expected: Iterable[Part]) -> None:
        """Refuses a folder with other tensors; names each that is missing, unknown or of another shape."""
        shapes = {part.name: part.shape for part in expected}
        found = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}
        wrong = [f"  {name}: missing" for name in shapes.keys() - found.keys()]
        wrong += [
            f"  {name}: shape {found[name]} must be {shapes[name]}"
            for name in shapes.keys() & found.keys()
            if found[name] != shapes[name]
        ]
        # Old checkpoints of Llama keep the frequencies of rotary embeddings, which follow from its config.
        extra = [name for name in found.keys() - shapes.keys() if not name.endswith("rotary_emb.inv_freq")]
        wrong += [f"  {name}: not known" for name in extra]
        if wrong:
            noun = "tensor" if len(wrong) == 1 else "tensors"
            first = f"{self.path}: {len(wrong)} {noun} not as its {CONFIG} says; download the folder again"
            raise ConvertError("\n".join([first, *sorted(wrong)]))

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        try:
            return self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise ConvertError(f"{self.path}: {name} cannot be read ({error}); download it again") from error


def write_folder(
    path: Path, config: Mapping[str, Any], parts: list[tuple[Part, int]], tensors: Iterator[Tensor]
) -> None:
    """Writes a folder aside and publishes it by rename.

    Args:
        parts: the tensors to come, with their bytes.
        tensors: in the order of `parts`; one shard of them is held at a time.
    """
    if path.exists():
        raise ConvertError(f"{path} exists; remove it, or give another folder")
    aside = path.with_name(f"{path.name}.tmp")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    shards = _shards(parts)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held = {part.name: next(tensors).cpu().contiguous() for part in shard}
        save_file(held, aside / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
    if len(shards) > 1:
        total = {"total_size": sum(size for _, size in parts)}
        _write_json(aside / INDEX, {"metadata": total, "weight_map": weight_map})
    _write_json(aside / CONFIG, config)
    os.sync()
    aside.rename(path)


def _shards(parts: list[tuple[Part, int]]) -> list[list[Part]]:
    """In order, each of at most SHARD_BYTES or of one tensor."""
    shards: list[list[Part]] = []
    room = 0
    for part, size in parts:
        if size > room or not shards:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(part)
        room -= size
    return shards


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ConvertError(f"{path} is not a whole safetensors file ({error}); download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file; it belongs to a model's folder on Hugging Face") from None
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(read, dict):
        raise ConvertError(f"{path} is not a mapping of names to values; download it again")
    return read


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
