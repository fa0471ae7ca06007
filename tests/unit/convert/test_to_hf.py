"""A checkpoint becomes a Hugging Face folder: the bits that it came from, in one file or many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.unit.convert.llada import TINY, logits, make_weights, write_folder
from tests.unit.convert.test_from_hf import IDS_BS, MODEL
from tests.unit.model.small import small_config
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.convert import hf_folder
from xdlm_megatron.convert.from_hf import convert_from_hf
from xdlm_megatron.convert.hf_config import ConvertError
from xdlm_megatron.convert.to_hf import convert_to_hf
from xdlm_megatron.evaluation.restore import restore_model
from xdlm_megatron.parallel.mesh import open_mesh


def config_for(folder: Path, tokenizer: str, **sections: dict[str, Any]) -> RunConfig:
    sections["model"] = MODEL | sections.get("model", {})
    sections["data"] = {"tokenizer": tokenizer}
    return small_config(**sections, train={"init_from": str(folder / "converted")})


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def tokenizer(tiny_data: dict) -> str:
    return str(tiny_data["tokenizer"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_changes_no_bit(dtype: str, tokenizer: str, tmp_path: Path) -> None:
    weights = make_weights(TINY, getattr(torch, dtype))
    config = config_for(tmp_path, tokenizer, precision={"dtype": dtype})
    checkpoint = convert_from_hf(config, write_folder(tmp_path / "hf", TINY, weights))
    convert_to_hf(config, tmp_path / "back", checkpoint=str(checkpoint), use_ema=False)
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"config.json", "model.safetensors"}
    again = read(tmp_path / "back")
    assert again.keys() == weights.keys()
    for name, tensor in weights.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name
    written = json.loads((tmp_path / "back/config.json").read_text())
    same = TINY.keys() & written.keys() - {"auto_map", "eos_token_id", "pad_token_id"}
    assert {key: written[key] for key in same} == {key: TINY[key] for key in same}
    assert written["eos_token_id"] == 1, "the tokenizer's"
    assert written["torch_dtype"] == dtype


def test_shards_have_an_index(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was written is read again."""
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 30_000)
    weights = make_weights(TINY)
    config = config_for(tmp_path, tokenizer)
    checkpoint = convert_from_hf(config, write_folder(tmp_path / "hf", TINY, weights))
    convert_to_hf(config, tmp_path / "back", checkpoint=str(checkpoint), use_ema=False)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 30_000 for file in files)
    assert {index["weight_map"][name]: None for name in weights} == {file.name: None for file in files}
    other = config_for(tmp_path / "other", tokenizer)
    convert_to_hf(
        other, tmp_path / "twice", checkpoint=str(convert_from_hf(other, tmp_path / "back")), use_ema=False
    )
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read(tmp_path / "twice").items())


def test_a_network_with_norms_on_queries_goes_under_qwen3s_names(tokenizer: str, tmp_path: Path) -> None:
    config = config_for(tmp_path, tokenizer, model={"qk_layernorm": True, "kv_channels": 12})
    with pytest.raises(ConvertError, match=r"model\.qk_layernorm=True.*add --names llama"):
        convert_to_hf(config, tmp_path / "back", checkpoint="none")
    hf = {
        "model_type": "a2d-qwen3",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "head_dim": 12,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-5,
        "vocab_size": 45,
        "tie_word_embeddings": True,
    }
    shapes = {
        "input_layernorm": (32,),
        "self_attn.q_proj": (48, 32),
        "self_attn.k_proj": (24, 32),
        "self_attn.v_proj": (24, 32),
        "self_attn.q_norm": (12,),
        "self_attn.k_norm": (12,),
        "self_attn.o_proj": (32, 48),
        "post_attention_layernorm": (32,),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }
    weights = {"model.embed_tokens.weight": torch.randn(45, 32), "model.norm.weight": torch.randn(32)}
    for layer in range(4):
        weights |= {f"model.layers.{layer}.{name}.weight": torch.randn(s) for name, s in shapes.items()}
    tied = {"qk_layernorm": True, "kv_channels": 12, "share_embeddings_and_output_weights": True}
    config = config_for(tmp_path, tokenizer, model=tied)
    checkpoint = convert_from_hf(config, write_folder(tmp_path / "hf", hf, weights, num_shards=2))
    convert_to_hf(config, tmp_path / "back", "llama", str(checkpoint), use_ema=False)
    again = read(tmp_path / "back")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]
    assert (written["head_dim"], written["tie_word_embeddings"]) == (12, True)


def test_weights_of_our_own_run_as_llada(tokenizer: str, tmp_path: Path) -> None:
    """A network that was never LLaDA's computes the same as LLaDA's code on its tensors."""
    hf = TINY | {"n_kv_heads": 4, "rope_theta": 10_000.0}
    config = config_for(tmp_path, tokenizer, model={"num_query_groups": None, "rotary_base": 10_000})
    checkpoint = convert_from_hf(config, write_folder(tmp_path / "hf", hf, make_weights(hf)))
    convert_to_hf(config, tmp_path / "back", checkpoint=str(checkpoint), use_ema=False)
    with open_mesh() as mesh:
        (model,), _ = restore_model(config, mesh, checkpoint, use_ema=False)
        with torch.no_grad():
            ours = model(IDS_BS).transpose(0, 1)[..., :45]
    written = json.loads((tmp_path / "back/config.json").read_text())
    expected = logits(written, read(tmp_path / "back"), IDS_BS)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_an_existing_folder_is_left_alone(tokenizer: str, tmp_path: Path) -> None:
    config = config_for(tmp_path, tokenizer)
    checkpoint = convert_from_hf(config, write_folder(tmp_path / "hf", TINY, make_weights(TINY)))
    with pytest.raises(ConvertError, match="exists; remove it"):
        convert_to_hf(config, tmp_path / "hf", checkpoint=str(checkpoint), use_ema=False)
