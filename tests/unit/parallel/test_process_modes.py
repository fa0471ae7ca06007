"""What deterministic_mode sets for the process, and takes back."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import pytest
import torch

from tests.unit.model.small import small_config
from xdlm_megatron.model.transformer_config import build_transformer_config
from xdlm_megatron.parallel.process_modes import (
    DETERMINISTIC_ENVIRONMENT,
    deterministic,
    tensor_parallel_overlap,
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DETERMINISTIC_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_it_is_set_inside_and_gone_afterwards() -> None:
    with deterministic(True):
        assert DETERMINISTIC_ENVIRONMENT.items() <= os.environ.items()
        assert torch.are_deterministic_algorithms_enabled()
    assert not DETERMINISTIC_ENVIRONMENT.keys() & os.environ.keys()
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_environment_to_the_contrary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with (
        pytest.raises(ValueError, match=r"NVTE_ALLOW_NONDETERMINISTIC_ALGO=1 contradicts .*unset it"),
        deterministic(True),
    ):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_algorithm_of_nccl_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    with deterministic(True):
        assert os.environ["NCCL_ALGO"] == "Tree"
    assert os.environ["NCCL_ALGO"] == "Tree"


class Base:
    """Transformer Engine's module, as far as the buffers go; test_transformer_engine.py has its signature."""

    class UserBufferQuantizationMode:
        NONE, FP8 = "none", "fp8"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def initialize_ub(self, **arguments: Any) -> None:
        self.calls.append(arguments)

    def destroy_ub(self) -> None:
        self.calls.append("destroyed")


@pytest.mark.parametrize(
    ("fp8", "first", "modes"),
    [(None, False, ["none"]), ("hybrid", False, ["fp8"]), ("hybrid", True, ["fp8", "none"])],
)
def test_buffers_of_overlapped_tensor_parallelism(
    fp8: str | None, first: bool, modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    transformer = build_transformer_config(config.model, config.parallel, config.precision)
    base = Base()
    module = types.ModuleType("transformer_engine.pytorch.module")
    module.base = base
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with tensor_parallel_overlap(transformer, 24, 2):
        assert base.calls == []
    transformer.tp_comm_overlap, transformer.context_parallel_size = True, 3
    transformer.fp8, transformer.first_last_layers_bf16 = fp8, first
    with tensor_parallel_overlap(transformer, 24, 2):
        (call,) = base.calls
        assert call["shape"] == [24 * 2 // 3, 32]
        assert call["quantization_modes"] == modes
        assert call.keys() == {"shape", "tp_size", "quantization_modes", "bootstrap_backend"}
    assert base.calls[-1] == "destroyed"
