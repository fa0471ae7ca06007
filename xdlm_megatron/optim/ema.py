"""Exponential moving average of the weights, float32, sharded as the optimizer shards its master weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter

from xdlm_megatron.optim.offload import inner_optimizers, master_weight
from xdlm_megatron.parallel.mesh import Mesh

KEY = "ema"


@dataclass
class _Shard:
    """The piece [start, end) of a flattened parameter whose master weights this process updates.

    main() is where they are now: the CPU's memory, if the optimizer is offloaded, and then the average too.
    """

    main: Callable[[], Tensor]
    average: Tensor
    start: int
    end: int


class Ema:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    The ramp is that of MDLM's and XDLM's code, n = 1 at the first update.
    """

    def __init__(
        self, chunks: list[MegatronModule], optimizer: MegatronOptimizer, decay: float, mesh: Mesh
    ) -> None:
        self.decay = decay
        self.num_updates = 0
        self._group = mesh.groups.dp_cp
        self._parameters = [p for chunk in chunks for p in chunk.parameters()]
        self._sharded = any(isinstance(inner, DistributedOptimizer) for inner in inner_optimizers(optimizer))
        self._shards = _find_shards(optimizer, self._parameters)

    @property
    def num_bytes(self) -> int:
        """Of this process's averages."""
        return sum(shard.average.nbytes for shard in self._shards.values())

    @torch.no_grad()
    def restart(self) -> None:
        """Begins anew from the weights as they are."""
        self.num_updates = 0
        for shard in self._shards.values():
            shard.average.copy_(shard.main().detach().view(-1))

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after an optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = [shard.average for shard in self._shards.values()]
        weights = [shard.main().detach().view(-1) for shard in self._shards.values()]
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averages in the model's place, and the weights back afterwards, bit for bit."""
        kept = [p.detach().clone() for p in self._parameters]
        try:
            with torch.no_grad():
                for parameter in self._parameters:
                    parameter.copy_(self._whole(parameter))
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(self._parameters, kept, strict=True):
                    parameter.copy_(before)

    def sharded_state(self, model_state: dict[str, Any], is_loading: bool) -> dict[str, Any]:
        """The averages in the model's own shapes, for Megatron's checkpoints; see `ema_state_like`."""
        # On the CPU at once: whole averages of all parameters need not fit beside the training state.
        averages = [_room_for(p) if is_loading else self._whole(p).cpu() for p in self._parameters]
        return ema_state_like(model_state, self._parameters, averages)

    @torch.no_grad()
    def load(self, state: dict[str, Any], num_updates: int) -> None:
        """Takes this process's shards from what `dist_checkpointing.load` made of `sharded_state`."""
        self.num_updates = num_updates
        for index, parameter in enumerate(self._parameters):
            shard = self._shards.get(parameter)
            if shard is not None:
                shard.average.copy_(state[str(index)].view(-1)[shard.start : shard.end])

    def _whole(self, parameter: Parameter) -> Tensor:
        """This process's tensor-parallel part of the average, whole over data parallel: float32."""
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        shard = self._shards.get(parameter)
        if shard is not None:
            whole.view(-1)[shard.start : shard.end] = shard.average
        if self._sharded:
            dist.all_reduce(whole, group=self._group)  # the shards are disjoint: adding zeros is exact
        return whole


@torch.no_grad()
def load_into_parameters(
    model_state: dict[str, Any], parameters: list[Parameter], load: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Fills a model's parameters with the averages of a checkpoint, rounded to their dtype.

    Args:
        load: reads a sharded state from the checkpoint, as `dist_checkpointing.load` does.
    """
    state = load(ema_state_like(model_state, parameters, [_room_for(p) for p in parameters]))
    for index, parameter in enumerate(parameters):
        parameter.copy_(state[str(index)])


def ema_state_like(
    model_state: dict[str, Any], parameters: list[Parameter], averages: list[Tensor]
) -> dict[str, Any]:
    """Sharded state with keys `ema.<the parameter's key>`, named by the parameter's place in the list.

    Args:
        model_state: the model's sharded_state_dict, whose tensors are its parameters.
        averages: float32, one for each parameter, of its shape.
    """
    index = {id(parameter): i for i, parameter in enumerate(parameters)}
    state = {}
    for sharded in nested_values(model_state):
        i = index.get(id(getattr(sharded, "data", None)))
        if i is not None:
            state[str(i)] = make_sharded_optimizer_tensor(sharded, averages[i], KEY)
    return state


def _room_for(parameter: Parameter) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)


def _find_shards(optimizer: MegatronOptimizer, parameters: list[Parameter]) -> dict[Parameter, _Shard]:
    shards = {}
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, DistributedOptimizer):
            for parameter, (group, order) in inner.model_param_group_index_map.items():
                main = partial(master_weight, inner, group, order)
                owned = inner._get_model_param_range_map(parameter)["param"]
                shards[parameter] = _Shard(main, _copy(main()), owned.start, owned.end)
            return shards
    for parameter in parameters:
        main = getattr(parameter, "main_param", None)
        main = parameter if main is None else main
        shards[parameter] = _Shard(lambda main=main: main, _copy(main), 0, parameter.numel())
    return shards


def _copy(main: Tensor) -> Tensor:
    return main.detach().float().clone().view(-1)
