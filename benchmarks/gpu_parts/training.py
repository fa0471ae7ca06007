"""Recipes of examples/ as the suite trains them: on one GPU, on bundled text, without a tracker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpu_parts.text import write_training_set
from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.parallel.mesh import open_mesh_for
from xdlm_megatron.train.run import Run, build_run

ROOT = Path(__file__).resolve().parents[2]
TINY = (  # a rehearsal's sizes, and what a CPU can compute
    "model={num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}",
    "data={train_prefix: none, tokenizer: none, seq_length: 32, vocab_size: 256, mask_id: 255}",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
)
FLOAT32, BF16 = "precision={dtype: float32}", "precision={dtype: bfloat16}"
FP8 = (  # as the FP8 recipes of examples/ have it
    "precision={dtype: bfloat16, fp8: hybrid, num_layers_at_start_in_bf16: 1, num_layers_at_end_in_bf16: 1}"
)


def prepare(work: Path, name: str, recipe: str, is_tiny: bool, overrides: Sequence[str]) -> list[str]:
    """[recipe, overrides ...]: arguments for `open_run`. Writes the training set to `work`."""
    path = ROOT / "examples" / recipe
    sizes = TINY if is_tiny else ()
    vocab_size = load_recipe(path, sizes).data.vocab_size
    data = write_training_set(work / f"{name}_data", vocab_size, documents=20 if is_tiny else None)
    common = ["tracking.mlflow=null", f"run.output_dir={work}", f"run.name={name}_run"]
    return [str(path), *sizes, *data, *common, *overrides]


@contextmanager
def open_run(recipe: Sequence[str]) -> Iterator[tuple[RunConfig, Run]]:
    """The recipe and its run, built on this process's device."""
    config = load_recipe(*recipe[:1], recipe[1:])
    with open_mesh_for(config.parallel) as mesh:
        yield config, build_run(config, mesh)
