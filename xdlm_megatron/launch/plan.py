"""The verb `plan`: what a recipe costs on a cluster, and which layout fits and is fastest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from xdlm_megatron.config.derive import derive, head_fusion
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.launch.cost import Step, step_cost
from xdlm_megatron.launch.gpus import GIB, GPUS, Gpu
from xdlm_megatron.launch.layout import Layout, Shape, all_layouts, not_priced, recipe_layout
from xdlm_megatron.launch.memory import Memory, host_bytes, stage_memory


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory and its time. spare: bytes of the GPU that are left; negative: missing."""

    layout: Layout
    memory: Memory
    spare: float
    step: Step

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def cost(self) -> float:
        """Seconds a step, a little more where memory is tight: of equals the one that needs less."""
        return self.step.seconds.total * (1 + 0.02 * self.memory.total / (self.memory.total + self.spare))


@dataclass(frozen=True)
class Plan:
    """recipe: its own layout, or why the GPUs cannot hold it. ranked: what fits, fastest first.

    nearest: where nothing fits, what misses the least. num_tried: layouts that the sizes allow. notes: what
    of the recipe is not in the figures.
    """

    shape: Shape
    gpu: Gpu
    world: int
    recipe: Candidate | str
    ranked: list[Candidate]
    nearest: list[Candidate]
    num_tried: int
    notes: list[str]


def choose_gpu(name: str, memory_gib: float | None) -> Gpu:
    """The GPU type, with other memory if it is given. Raises ValueError for an unknown name."""
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: no such GPU type here; choose {', '.join(GPUS)}")
    return GPUS[name] if memory_gib is None else replace(GPUS[name], memory=memory_gib * GIB)


def make_plan(config: RunConfig, gpu: Gpu, world: int, top: int = 8) -> Plan:
    """Prices the recipe's layout and every other one on `world` GPUs."""
    shape = Shape.of(config)
    if shape.fp8_layers and gpu.fp8_flops is None:
        raise ValueError(
            f"precision.fp8={config.precision.fp8}: GPUs of type {gpu.name} have none; set it to null"
        )
    best: dict[tuple[int, ...], Candidate] = {}
    nearest: list[Candidate] = []
    num_tried = 0
    for layout in all_layouts(shape, world, gpu.per_node, head_fusion(config)):
        num_tried += 1
        found = price(shape, layout, gpu)
        if not found.fits:
            nearest = sorted([*nearest, found], key=lambda c: -c.spare)[:top]
            continue
        # One line for each split of the work: its best micro-batch, interleaving and recomputation.
        key = (layout.tp, layout.pp, layout.cp)
        if key not in best or found.cost < best[key].cost:
            best[key] = found
    ranked = sorted(best.values(), key=lambda c: c.cost)[:top]
    recipe = _price_recipe(config, shape, gpu, world)
    return Plan(shape, gpu, world, recipe, ranked, [] if ranked else nearest, num_tried, not_priced(config))


def price(shape: Shape, layout: Layout, gpu: Gpu) -> Candidate:
    """Memory and time of one layout."""
    memory = stage_memory(shape, layout)
    return Candidate(layout, memory, gpu.memory - memory.total, step_cost(shape, layout, gpu))


def _price_recipe(config: RunConfig, shape: Shape, gpu: Gpu, world: int) -> Candidate | str:
    try:
        derive(config, world)
    except ValueError as error:
        return str(error)
    return price(shape, recipe_layout(config, world), gpu)


def to_json(plan: Plan) -> str:
    """All of the plan as one JSON object; bytes, seconds."""

    def candidate(found: Candidate) -> dict[str, object]:
        return {
            "layout": dataclasses.asdict(found.layout) | {"dp": found.layout.dp},
            "overrides": found.layout.overrides(),
            "fits": found.fits,
            "spare_bytes": found.spare,
            "memory_bytes": dataclasses.asdict(found.memory) | {"total": found.memory.total},
            "host_memory_bytes": host_bytes(plan.shape, found.layout),
            "step": dataclasses.asdict(found.step) | {"seconds_total": found.step.seconds.total},
        }

    def candidates(found: Iterable[Candidate]) -> list[dict[str, object]]:
        return [candidate(c) for c in found]

    tree = {
        "gpu": dataclasses.asdict(plan.gpu),
        "gpus": plan.world,
        "model": dataclasses.asdict(plan.shape),
        "recipe": plan.recipe if isinstance(plan.recipe, str) else candidate(plan.recipe),
        "ranked": candidates(plan.ranked),
        "nearest": candidates(plan.nearest),
        "num_layouts_tried": plan.num_tried,
        "notes": plan.notes,
    }
    return json.dumps(tree, indent=1)
