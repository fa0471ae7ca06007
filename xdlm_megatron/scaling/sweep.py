"""A sweep: one file, many recipes. The file is a recipe with one more section, `sweep`.

Every run of it is an ordinary run with an ordinary, whole recipe: size, tokens, batch, learning rate and the
axes' values are written out. Its folder is `run.output_dir`/`run.name`/RUN.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from xdlm_megatron.config.derive import Derived, derive, model_parallel_size
from xdlm_megatron.config.load import (
    ConfigError,
    build_config,
    read_tree,
    set_field,
    validate,
    with_overrides,
)
from xdlm_megatron.config.schema import Run, RunConfig
from xdlm_megatron.launch.gpus import GIB
from xdlm_megatron.launch.plan import Plan, choose_gpu, make_plan
from xdlm_megatron.scaling.ladder import BATCH_RULES, LADDER, LR_RULES, Scale
from xdlm_megatron.scaling.sweep_schema import Sweep

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Point:
    """One run. size, budget: as in its name; world: its processes; seconds: of training, by the planner."""

    name: str
    size: str
    budget: str
    config: RunConfig
    figures: Derived
    world: int
    seconds: float | None

    @property
    def flops(self) -> float:
        return self.figures.flops_per_token * self.figures.total_tokens

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.world / 3600


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep, cheapest first. left_out: what its limits on steps exclude, in words."""

    name: str
    folder: Path
    sweep: Sweep
    points: Sequence[Point]
    left_out: Sequence[str]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepPlan:
    """Reads a sweep's file; overrides may be of `sweep` and of the recipe.

    Raises:
        ConfigError: as `load_recipe`; no section `sweep`, no run is left, or one does not fit its GPUs.
    """
    source = Path(path).name
    tree = read_tree(path, overrides)
    if "sweep" not in tree:
        raise ConfigError(f"{source}: has no section `sweep`; see examples/ladder.yaml")
    sweep = validate(Sweep, tree.pop("sweep"), f"{source}, section sweep")
    run = validate(Run, tree.get("run"), f"{source}, section run")
    _check_sizes(sweep, source)
    builder = _Builder(sweep, tree, Path(run.output_dir) / run.name)
    points, left_out = [], []
    wanted = list(_combinations(sweep))
    for size, budget, axes in tqdm(wanted, "plan", leave=False, delay=1, disable=None):
        name = "-".join([size, _budget_name(sweep, budget), *(value.name for value in axes)])
        config = builder.build(name, size, budget, axes)
        reason = _outside(sweep, config)
        if reason is None:
            points.append(builder.place(name, size, _budget_name(sweep, budget), config))
        else:
            left_out.append(f"{name}: {reason}")
    if not points:
        raise ConfigError(
            f"{source}: sweep.steps and sweep.tokens_per_parameter leave no run ({left_out[0]}); widen them"
        )
    if len({point.name for point in points}) < len(points):
        raise ConfigError(f"{source}: two values of an axis or of the design look alike; write them apart")
    points.sort(key=lambda point: float(f"{point.flops:.2g}"))
    return SweepPlan(run.name, builder.folder, sweep, points, left_out)


class _AxisValue(NamedTuple):
    """Where an axis stands: its part of the run's name, and what it sets. source: for messages."""

    name: str
    fields: Mapping[str, Any]
    source: str


def _combinations(sweep: Sweep) -> Iterator[tuple[str, float, tuple[_AxisValue, ...]]]:
    axes = [_axis_values(axis, values) for axis, values in sweep.axes.items()]
    for size, budget in itertools.product(sweep.sizes, sweep.design.budgets):
        for values in itertools.product(*axes):
            fields = [field for value in values for field in value.fields]
            twice = next((field for field in fields if fields.count(field) > 1), None)
            if twice is not None:
                raise ConfigError(f"sweep.axes: two axes set {twice}; leave it to one of them")
            yield size, budget, values


def _axis_values(axis: str, values: list[Any] | Mapping[str, Mapping[str, Any]]) -> list[_AxisValue]:
    """Of a field, its values; of an axis of cases, named by them."""
    source = f"sweep.axes.{axis}"
    if isinstance(values, list):
        field = axis.split(".")[-1]
        return [_AxisValue(f"{field}{_word(value)}", {axis: value}, source) for value in values]
    return [_AxisValue(_word(name), fields, f"{source}.{name}") for name, fields in values.items()]


def _word(value: Any) -> str:
    return _NOT_IN_NAMES.sub("_", str(value))


def _check_sizes(sweep: Sweep, source: str) -> None:
    unknown = [] if isinstance(sweep.sizes, dict) else [name for name in sweep.sizes if name not in LADDER]
    if unknown or not sweep.sizes:
        raise ConfigError(
            f"{source}: sweep.sizes={unknown}: the ladder has {', '.join(LADDER)}; take some of them, or "
            "give the fields of your own: {name: {num_layers: ..., hidden_size: ..., ...}}"
        )


def _outside(sweep: Sweep, config: RunConfig) -> str | None:
    """Why the limits of the sweep leave the run out."""
    steps, figures = config.train.num_steps, derive(config, model_parallel_size(config))
    ratio = figures.total_tokens / figures.num_parameters
    if not sweep.steps[0] <= steps <= sweep.steps[1]:
        return f"{steps:,} steps"
    if not sweep.tokens_per_parameter[0] <= ratio <= sweep.tokens_per_parameter[1]:
        return f"{ratio:.3g} tokens per parameter"
    return None


def _budget_name(sweep: Sweep, budget: float) -> str:
    return sweep.design.letter + f"{budget:.4g}".replace("e+", "e")


class _Builder:
    """Makes recipes and places them on processes."""

    def __init__(self, sweep: Sweep, tree: Mapping[str, Any], folder: Path) -> None:
        self.sweep, self.tree, self.folder = sweep, tree, folder
        self._plans: dict[str, Plan] = {}

    def build(self, name: str, size: str, budget: float, axes: Sequence[_AxisValue]) -> RunConfig:
        """The recipe of a run: once with one step, for what its length follows from, then with its length."""
        sweep = self.sweep
        tree = copy.deepcopy(dict(self.tree))
        sections = ("run", "model", "optimizer", "lr_schedule", "train", "tracking")
        tree |= {section: dict(tree.get(section) or {}) for section in sections}
        tree["run"] |= {"name": name, "output_dir": str(self.folder)}
        tree["tracking"].setdefault("parent_run", self.folder.name)
        tree["model"] |= sweep.sizes[size] if isinstance(sweep.sizes, dict) else vars(LADDER[size])
        for axis in axes:
            for dotted, value in axis.fields.items():
                set_field(tree, dotted, value, axis.source)
        train = tree["train"]
        if sweep.batch != "fixed":
            train["global_batch_size"] = train.get("micro_batch_size")
        if sweep.lr != "fixed":
            tree["optimizer"]["lr"] = 1.0
        self._set_length(tree, 1)
        short = build_config(tree, source=name)
        figures = derive(short, model_parallel_size(short))
        tokens = sweep.design.tokens(budget, figures)
        scale = Scale(figures.num_non_embedding_parameters, tokens, tokens * figures.flops_per_token)
        if sweep.batch != "fixed":
            sequences = BATCH_RULES[sweep.batch](scale) / short.data.seq_length
            train["global_batch_size"] = _round_batch(sequences, short.train.micro_batch_size)
        if sweep.lr != "fixed":
            tree["optimizer"]["lr"] = float(f"{LR_RULES[sweep.lr](scale):.3g}")
        self._set_length(tree, round(tokens / (train["global_batch_size"] * short.data.seq_length)))
        return build_config(tree, source=name)

    def _set_length(self, tree: dict[str, Any], num_steps: int) -> None:
        steps = max(1, num_steps)
        tree["train"]["num_steps"] = steps
        schedule = tree["lr_schedule"]
        schedule["warmup_steps"] = min(steps - 1, round(self.sweep.warmup * steps))
        if schedule.get("kind") == "wsd":
            schedule["decay_steps"] = max(1, round(self.sweep.decay * steps))

    def place(self, name: str, size: str, budget: str, config: RunConfig) -> Point:
        """On the GPUs of its size, in the planner's layout; without a GPU type in the recipe's own."""
        sweep = self.sweep
        gpus = sweep.gpus.get(size) if isinstance(sweep.gpus, dict) else sweep.gpus
        if sweep.gpu is None:
            world = gpus or model_parallel_size(config)
            return Point(name, size, budget, config, derive(config, world), world, None)
        gpu = choose_gpu(sweep.gpu, None)
        world = gpus or gpu.per_node
        masks_only = config.diffusion.uniform_ratio == 0
        key = repr((config.model, config.data, config.train.global_batch_size, masks_only, world))
        if (
            key not in self._plans
        ):  # all of the recipe that a plan of a step depends on and that a sweep varies
            self._plans[key] = make_plan(config, gpu, world, top=1)
        plan = self._plans[key]
        if not plan.ranked:
            lacks = f"; the nearest lacks {-plan.nearest[0].spare / GIB:.1f} GiB" if plan.nearest else ""
            raise ConfigError(
                f"{name}: no layout fits {world} x {gpu.name} at a batch of {config.train.global_batch_size} "
                f"sequences{lacks}; change sweep.gpus.{size} or sweep.gpu"
            )
        best = plan.ranked[0]
        placed = with_overrides(config, best.layout.overrides())
        seconds = best.step.seconds.total * config.train.num_steps
        return Point(name, size, budget, placed, derive(placed, world), world, seconds)


def _round_batch(sequences: float, micro_batch_size: int) -> int:
    """The nearest power of two (in ratio) times the micro-batch, at least one of them."""
    size = micro_batch_size
    while size * 2**0.5 < sequences:
        size *= 2
    return size
