"""`convert --to-hf`: a checkpoint becomes a Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from xdlm_megatron.config.derive import num_query_groups
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.convert.hf_config import FAMILIES, ConvertError
from xdlm_megatron.convert.hf_folder import write_folder
from xdlm_megatron.convert.layout import on_one_process
from xdlm_megatron.convert.names import parts_of, split
from xdlm_megatron.data.tokenizer import load_tokenizer
from xdlm_megatron.evaluation.restore import choose_checkpoint, restore_model
from xdlm_megatron.model.build import unwrap
from xdlm_megatron.parallel.mesh import open_mesh_for


def convert_to_hf(
    config: RunConfig, folder: Path, names: str = "llada", checkpoint: str | None = None, use_ema: bool = True
) -> None:
    """Writes safetensors in precision.dtype and a config.json.

    Args:
        names: of the tensors, a key of FAMILIES.
        checkpoint: its folder; None: the run's latest.
        use_ema: the averaged weights, rounded to precision.dtype.

    Raises:
        ConvertError: the folder exists, or the names have no place for this network.
        CheckpointError: there is no such checkpoint, or it is of another network.
    """
    if config.model.autoregressive:
        raise ConvertError(
            "model.autoregressive=true begins with a token of its own, which no family's config.json can "
            "say; convert a denoiser"
        )
    config = on_one_process(config)
    family = FAMILIES[names]
    hf_config = family.write(config, load_tokenizer(config.data.tokenizer).eod_id)
    path = choose_checkpoint(config, checkpoint)
    with open_mesh_for(config.parallel) as mesh:
        chunks, step = restore_model(config, mesh, path, use_ema)
        mine = dict(unwrap(chunks[0]).named_parameters())
        parameters = parts_of(config, family.names)
        itemsize = next(iter(mine.values())).itemsize
        parts = [(part, itemsize * math.prod(part.shape)) for found in parameters.values() for part in found]
        total = sum(size for _, size in parts)
        with tqdm(desc="writing", total=total, unit="B", unit_scale=True, disable=None) as bar:

            def tensors() -> Iterator[Tensor]:
                for name, found in parameters.items():
                    for tensor in split(mine[name].detach(), found, num_query_groups(config)):
                        yield tensor
                        bar.update(tensor.nbytes)

            dtype = {"torch_dtype": config.precision.dtype}
            write_folder(folder, hf_config | dtype, parts, tensors())
    kind = "averaged" if use_ema else "plain"
    print(f"{folder}: {kind} weights of {path} (step {step}), {total:,} bytes", flush=True)
