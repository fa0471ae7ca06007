"""A Hugging Face folder becomes a checkpoint of the same network, or one message says what does not fit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.convert.llada import TINY, logits, make_weights, write_folder
from tests.unit.model.small import small_config
from xdlm_megatron.checkpoint.reader import CheckpointError
from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.convert import hf_folder
from xdlm_megatron.convert.from_hf import convert_from_hf, print_sections
from xdlm_megatron.convert.hf_config import ConvertError
from xdlm_megatron.convert.names import LLADA, LLAMA, parts_of
from xdlm_megatron.evaluation.restore import restore_model
from xdlm_megatron.parallel.mesh import open_mesh

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "qk_layernorm": False,
    "rotary_base": 500_000,
}


def config_for(target: Path, **sections: dict[str, Any]) -> RunConfig:
    sections["model"] = MODEL | sections.get("model", {})
    sections["train"] = {"init_from": str(target)} | sections.get("train", {})
    return small_config(**sections)


def run(config: RunConfig, checkpoint: Path, ids_BS: Tensor) -> Tensor:
    """Logits [B, S, padded V] of our network from the checkpoint."""
    with open_mesh() as mesh:
        (model,), step = restore_model(config, mesh, checkpoint, use_ema=False)
        assert step == 0
        with torch.no_grad():
            return model(ids_BS).transpose(0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one, of two shards; copy it before damaging it."""
    return write_folder(tmp_path_factory.mktemp("whole") / "hf", TINY, make_weights(TINY), num_shards=2)


IDS_BS = torch.randint(45, (3, 12), generator=torch.Generator().manual_seed(1))
KINDS: dict[str, tuple[dict, dict]] = {
    "grouped": ({}, {}),
    "plain heads": ({"n_kv_heads": 4}, {"num_query_groups": None}),
    "tied": ({"weight_tying": True}, {"share_embeddings_and_output_weights": True}),
    "other base and epsilon": (
        {"rope_theta": 100.0, "rms_norm_eps": 1e-2},
        {"rotary_base": 100, "layernorm_epsilon": 1e-2},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_lladas(kind: str, tmp_path: Path) -> None:
    changes, model = KINDS[kind]
    hf = TINY | changes
    weights = make_weights(hf)
    folder = write_folder(tmp_path / "hf", hf, weights, num_shards=3 if kind == "grouped" else 1)
    config = config_for(tmp_path / "converted", model=model)
    ours = run(config, convert_from_hf(config, folder), IDS_BS)
    expected = logits(hf, weights, IDS_BS)
    assert expected.std() > 0.5
    torch.testing.assert_close(ours[..., :45], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert not ours[..., 45:].any(), "rows of the padded vocabulary are zero"


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Another order of queries, of gate and up, another rotation or direction would be seen."""
    weights = make_weights(TINY)
    expected = logits(TINY, weights, IDS_BS)
    bound = 1e-3 * expected.abs().max()
    block = "model.transformer.blocks.0"
    swapped = dict(weights)
    for one, other in (("ff_proj", "up_proj"), ("k_proj", "v_proj")):
        names = [f"{block}.{name}.weight" for name in (one, other)]
        swapped |= {names[0]: weights[names[1]], names[1]: weights[names[0]]}
        assert (logits(TINY, swapped, IDS_BS) - expected).abs().max() > bound
        swapped = dict(weights)
    query = f"{block}.q_proj.weight"
    interleaved = weights[query].view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)  # the other rotary order
    assert (logits(TINY, swapped | {query: interleaved}, IDS_BS) - expected).abs().max() > bound
    assert (logits(TINY | {"rope_theta": 10_000.0}, weights, IDS_BS) - expected).abs().max() > bound


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_llama_names_are_the_same_network(kind: str, tmp_path: Path) -> None:
    """The tensors of a LLaDA under Llama's names give what they give under its own; Qwen3's have two more."""
    with_norms = kind == "qwen3"
    like = TINY | {"attention_layer_norm": with_norms}
    weights = make_weights(like)
    norms = {f"{x}_norm": f"model.transformer.blocks.{{}}.{x[0]}_norm.weight" for x in ("query", "key")}
    renamed = {
        LLAMA[part].format(layer): weights[name.format(layer)]
        for part, name in {**LLADA, **(norms if with_norms else {})}.items()
        for layer in range(4)
    }
    assert len(renamed) == len(weights)
    hf = {
        "model_type": kind,
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": 45,
    }
    config = config_for(tmp_path / "converted", model={"qk_layernorm": with_norms})
    ours = run(config, convert_from_hf(config, write_folder(tmp_path / "hf", hf, renamed)), IDS_BS)
    expected = logits(like, weights, IDS_BS)
    torch.testing.assert_close(ours[..., :45], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_what_was_converted_knows_no_noise(folder: Path, tmp_path: Path) -> None:
    """It may be evaluated under any; another network is refused."""
    checkpoint = convert_from_hf(config_for(tmp_path / "converted"), folder)
    run(config_for(tmp_path / "converted", diffusion={"uniform_ratio": 0.0}), checkpoint, IDS_BS)
    with pytest.raises(CheckpointError, match=r"model\.rotary_base=500000 and the recipe says 7"):
        run(config_for(tmp_path / "converted", model={"rotary_base": 7}), checkpoint, IDS_BS)


def test_what_a_recipe_trains_under_does_not_matter(folder: Path, tmp_path: Path) -> None:
    """One process and PyTorch's layers convert for FP8, many stages and recomputation."""
    config = config_for(
        tmp_path / "converted",
        model={"mcore": {"recompute_granularity": "full", "recompute_method": "block"}},
        parallel={"pipeline_model_parallel_size": 2},
        precision={"dtype": "bfloat16", "fp8": "hybrid"},
        data={"seq_length": 32},
    )
    plain = config_for(tmp_path / "plain", precision={"dtype": "bfloat16"})
    checkpoints = [convert_from_hf(each, folder) for each in (config, plain)]
    logits = [run(plain, checkpoint, IDS_BS) for checkpoint in checkpoints]
    assert torch.equal(*logits)


def test_names_are_those_of_the_published_weights() -> None:
    """GSAI-ML/LLaDA-8B-Base's index: 291 tensors, total_size 16,031,162,368 in bfloat16."""
    config = load_recipe(Path(__file__).parents[3] / "examples/llada_8b_cpt.yaml")
    parts = [part for found in parts_of(config, LLADA).values() for part in found]
    assert len({part.name for part in parts}) == len(parts) == 291
    assert 2 * sum(math.prod(part.shape) for part in parts) == 16_031_162_368
    last = {part.name.removeprefix("model.transformer.blocks.31.") for part in parts if ".31." in part.name}
    assert last == {
        f"{name}.weight"
        for name in "attn_norm attn_out ff_norm ff_out ff_proj k_proj q_proj up_proj v_proj".split()
    }


def test_every_field_that_differs_is_named(folder: Path, tmp_path: Path) -> None:
    model = {
        "num_layers": 2,
        "qk_layernorm": True,
        "rotary_base": 10_000,
        "mcore": {"rotary_interleaved": True},
    }
    config = config_for(tmp_path / "converted", model=model, data={"vocab_size": 64})
    with pytest.raises(ConvertError, match=r"5 fields; change them, or print .* by --write-recipe") as error:
        convert_from_hf(config, folder)
    for line in (
        "model.num_layers=2 must be 4",
        "model.qk_layernorm=True must be False",
        "model.rotary_base=10000 must be 500000",
        "data.vocab_size=64 must be 45",
        "model.mcore.rotary_interleaved=True must be False",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "converted").exists()


def test_sections_that_are_printed_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    print_sections(folder)
    sections = yaml.safe_load(capsys.readouterr().out)
    config = small_config(**sections, train={"init_from": str(tmp_path / "converted")})
    assert convert_from_hf(config, folder).name == "step_00000000"


def write_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = make_weights(TINY)
    change(weights)
    shutil.rmtree(folder)
    write_folder(folder, TINY, weights)


def test_every_tensor_that_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "hf"
    shutil.copytree(folder, copy)
    prefix = "model.transformer"

    def change(weights: dict[str, Tensor]) -> None:
        del weights[f"{prefix}.blocks.1.up_proj.weight"]
        weights[f"{prefix}.wte.weight"] = torch.zeros(44, 32)
        weights[f"{prefix}.blocks.0.q_proj.bias"] = torch.zeros(32)

    write_weights(copy, change)
    with pytest.raises(ConvertError, match=r"3 tensors not as its config\.json says") as error:
        convert_from_hf(config_for(tmp_path / "converted"), copy)
    for line in (
        "model.transformer.blocks.1.up_proj.weight: missing",
        "model.transformer.wte.weight: shape (44, 32) must be (45, 32)",
        "model.transformer.blocks.0.q_proj.bias: not known",
    ):
        assert line in str(error.value)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder; download the model there"),
    "no config": (lambda path: (path / "config.json").unlink(), r"config\.json: no such file"),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), r"config\.json is not JSON"),
    "no mapping": (lambda path: (path / "config.json").write_text("[]"), "is not a mapping"),
    "no shard": (
        lambda path: (path / "model-00002-of-00002.safetensors").unlink(),
        r"model-00002-of-00002\.safetensors missing, as model\.safetensors\.index\.json says",
    ),
    "cut short": (
        lambda path: (path / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 100),
        r"model-00001-of-00002\.safetensors is not a whole safetensors file",
    ),
    "no weights": (
        lambda path: [file.unlink() for file in path.iterdir() if file.name != "config.json"],
        r"no \*\.safetensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_refused(fault: str, folder: Path, tmp_path: Path) -> None:
    damage, message = FAULTS[fault]
    shutil.copytree(folder, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ConvertError, match=message):
        convert_from_hf(config_for(tmp_path / "converted"), tmp_path / "hf")


def with_config(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(folder, tmp_path / "hf")
    hf = {key: value for key, value in (TINY | changes).items() if value != "absent"}
    (tmp_path / "hf/config.json").write_text(json.dumps(hf))
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"include_qkv_bias": True, "alibi": True},
            ["include_qkv_bias=True must be False", "alibi=True must"],
        ),
        ({"block_type": "absent"}, ["block_type='sequential' must be 'llama'"]),
        ({"model_type": "mamba"}, ["model_type='mamba' must be llada, llama or qwen3"]),
        ({"n_layers": "absent"}, ["n_layers is missing"]),
        ({"n_heads": 0}, ["config.json: a size is no number above 0"]),
        ({"rope_theta": "500k"}, ["model.rotary_base=500000 must be '500k'"]),
    ],
)
def test_another_kind_of_network_is_refused(
    changes: dict, messages: list[str], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConvertError) as error:
        convert_from_hf(config_for(tmp_path / "converted"), with_config(folder, tmp_path, changes))
    for message in messages:
        assert message in str(error.value)


def test_where_it_goes_must_be_said_and_free(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConvertError, match=r"train\.init_from says where the checkpoint goes, and is null"):
        convert_from_hf(config_for(tmp_path, train={"init_from": None}), folder)
    (tmp_path / "step_00000000").mkdir()
    with pytest.raises(ConvertError, match="holds a checkpoint; remove it"):
        convert_from_hf(config_for(tmp_path), folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConvertError, match="convert is one process and not 2"):
        convert_from_hf(config_for(tmp_path / "converted"), folder)


def test_a_parameter_without_a_name_there_is_refused(folder: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path / "converted", model={"mcore": {"add_qkv_bias": True}})
    with pytest.raises(ConvertError, match=r"decoder\.layers\.0\.self_attention\.linear_qkv\.bias"):
        convert_from_hf(config, folder)


def test_one_parameter_is_held_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the model, never more of the folder's tensors alive than one parameter of ours is made of."""
    import weakref

    alive: dict[str, weakref.ref[Tensor]] = {}
    most = 0
    load = hf_folder.HfFolder.load

    def watched(self: hf_folder.HfFolder, name: str) -> Tensor:
        nonlocal most
        tensor = load(self, name)
        alive[name] = weakref.ref(tensor)
        most = max(most, sum(ref() is not None for ref in alive.values()))
        return tensor

    monkeypatch.setattr(hf_folder.HfFolder, "load", watched)
    convert_from_hf(config_for(tmp_path / "converted"), folder)
    assert len(alive) == 3 + 9 * 4
    assert 3 <= most <= 4, "queries, keys and values, and at most what was read before"
