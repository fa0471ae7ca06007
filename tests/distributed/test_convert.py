"""LLaDA's weights under layouts: the same logits, and a run that begins with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch, read_series, write_recipe
from tests.distributed.layouts import PP2, SP, TP2
from tests.distributed.same import assert_same_tensors, load_tensors
from tests.unit.convert.llada import TINY, logits, make_weights, write_folder

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("logits_main.py")


@pytest.fixture(scope="module")
def hf(tiny_recipe: dict) -> dict:
    data = tiny_recipe["data"]
    return TINY | {"embedding_size": data["vocab_size"], "mask_token_id": data["mask_id"]}


@pytest.fixture(scope="module")
def folder(hf: dict, tiny_recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ is LLaDA's folder, converted/ our checkpoints, converted.yaml the recipe."""
    folder = tmp_path_factory.mktemp("llada")
    write_folder(folder / "hf", hf, make_weights(hf), num_shards=2)
    recipe = {
        **tiny_recipe,
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "qk_layernorm": False,
            "rotary_base": 500_000,
        },
        # 400 states: the embedding is padded to 448 on one process, to 512 under TP 2.
        "data": {**tiny_recipe["data"], "make_vocab_size_divisible_by": 64},
        "lr_schedule": {"kind": "constant", "warmup_steps": 1},
        "train": {**tiny_recipe["train"], "num_steps": 4, "init_from": str(folder / "converted")},
    }
    path = write_recipe(folder, recipe, "converted")
    # The recipe's layout does not matter: one process converts.
    output = launch(1, "convert", path, [TP2, "--from-hf", str(folder / "hf")])
    assert f"train.init_from={folder / 'converted'} starts a run from it" in output
    return folder


@pytest.mark.parametrize("layout", [[TP2], [TP2, SP], [PP2], [TP2, PP2]], ids="-".join)
def test_logits_are_lladas_under_every_layout(
    layout: list[str], hf: dict, folder: Path, tmp_path: Path
) -> None:
    ids_BS = torch.randint(hf["embedding_size"], (2, 32), generator=torch.Generator().manual_seed(0))
    torch.save(ids_BS, tmp_path / "ids.pt")
    arguments = [str(folder / "converted/step_00000000"), str(tmp_path), *layout]
    launch(
        4 if len(layout) == 2 and SP not in layout else 2,
        "run",
        folder / "converted.yaml",
        arguments,
        PROGRAM,
    )
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2 if TP2 in layout else 1)]
    expected = logits(hf, make_weights(hf), ids_BS)
    ours = torch.cat(shards, dim=-1)[..., : hf["embedding_size"]]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_run_begins_with_them_and_resumes_to_the_bit(folder: Path) -> None:
    """Under TP 2, with other noise than the recipe that converted says; the first update has rate 0."""
    recipe = folder / "converted.yaml"
    options = [TP2, "diffusion.uniform_ratio=0.4"]
    output = launch(
        2,
        "train",
        recipe,
        [*options, "run.name=whole", "checkpoint.save_interval=1", "checkpoint.keep_last=9"],
    )
    assert f"starts from the weights in {folder / 'converted'}" in output
    launch(2, "train", recipe, [*options, "run.name=parts", "train.stop_after_step=2"])
    launch(2, "train", recipe, [*options, "run.name=parts", "--resume"])
    whole, parts = folder / "runs/whole", folder / "runs/parts"
    assert_same_tensors(*(run / "checkpoints/step_00000004" for run in (whole, parts)))
    for name in ("train/nelbo", "train/grad_norm"):
        assert read_series(whole / "metrics.jsonl", name) == read_series(parts / "metrics.jsonl", name)
    converted = load_tensors(folder / "converted/step_00000000")
    first = load_tensors(whole / "checkpoints/step_00000001")
    last = load_tensors(whole / "checkpoints/step_00000004")
    for name, tensor in converted.items():
        assert torch.equal(first[name][: len(tensor)], tensor), name
        assert not torch.equal(last[name][: len(tensor)], tensor), name
