"""`convert --from-hf`: the weights of a Hugging Face folder become a checkpoint that a run starts from."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from xdlm_megatron.checkpoint.contents import model_state
from xdlm_megatron.checkpoint.reader import list_checkpoints
from xdlm_megatron.checkpoint.writer import CheckpointWriter
from xdlm_megatron.config.derive import num_query_groups
from xdlm_megatron.config.load import to_tree
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.convert.hf_config import ConvertError, as_sections, check_recipe, family_of, fields_of
from xdlm_megatron.convert.hf_folder import CONFIG, HfFolder
from xdlm_megatron.convert.layout import on_one_process
from xdlm_megatron.convert.names import Part, join, parts_of
from xdlm_megatron.model.build import build_model, unwrap
from xdlm_megatron.model.dlm import DiffusionLM
from xdlm_megatron.parallel.mesh import open_mesh_for
from xdlm_megatron.train.state import TrainState


def print_sections(folder: Path) -> None:
    """Prints the sections of a recipe that fit a folder's config.json."""
    hf = HfFolder(folder)
    path = folder / CONFIG
    print(f"# as {path} says\n{as_sections(fields_of(hf.config, family_of(hf.config, path), path))}", end="")


def convert_from_hf(config: RunConfig, folder: Path) -> Path:
    """Writes the checkpoint of step 0 to train.init_from; any layout loads it. Returns its folder.

    Weights are rounded to precision.dtype where they have another one.

    Raises:
        ConvertError: the folder is not whole, or not of the recipe's network; names every fault.
    """
    config = on_one_process(config)
    target = _target(config)
    hf = HfFolder(folder)
    path = folder / CONFIG
    family = family_of(hf.config, path)
    check_recipe(config, fields_of(hf.config, family, path), path)
    parameters = parts_of(config, family.names)
    hf.check(part for parts in parameters.values() for part in parts)
    with open_mesh_for(config.parallel) as mesh:
        (chunk,) = (unwrap(chunk) for chunk in build_model(config, mesh, draw_weights=False))
        dtypes = fill(chunk, hf, parameters, num_query_groups(config))
        stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        print(f"{folder} holds {stored}; writes {config.precision.dtype} to {target}", flush=True)
        state = model_state([chunk], mesh.groups) | {
            "train_state": TrainState().to_dict(),
            "recipe": to_tree(config),
            "converted_from": str(folder),
        }
        written = CheckpointWriter(target, mesh, keep_last=1).save(0, state)
    print(f"{written}: train.init_from={target} starts a run from it", flush=True)
    return written


@torch.no_grad()
def fill(
    chunk: DiffusionLM, hf: HfFolder, parameters: dict[str, tuple[Part, ...]], num_groups: int
) -> set[torch.dtype]:
    """Takes a whole network from the folder, a parameter at a time; returns the types its tensors have."""
    mine = dict(chunk.named_parameters())
    if mine.keys() != parameters.keys():
        strange = ", ".join(sorted(mine.keys() ^ parameters.keys()))
        raise ConvertError(f"model.mcore changes which parameters there are ({strange}); remove that field")
    total, dtypes = sum(parameter.nbytes for parameter in mine.values()), set()
    # tqdm is silent where stderr is no terminal.
    with tqdm(desc="reading", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for name, parameter in mine.items():
            whole = join([hf.load(part.name) for part in parameters[name]], num_groups)
            parameter[: len(whole)].copy_(whole)
            parameter[len(whole) :].zero_()  # rows of the padded vocabulary
            dtypes.add(whole.dtype)
            bar.update(parameter.nbytes)
    return dtypes


def _target(config: RunConfig) -> Path:
    if config.train.init_from is None:
        raise ConvertError(
            "train.init_from says where the checkpoint goes, and is null; add train.init_from=FOLDER"
        )
    target = Path(config.train.init_from)
    if list_checkpoints(target):
        raise ConvertError(f"train.init_from={target} holds a checkpoint; remove it, or give another folder")
    return target
