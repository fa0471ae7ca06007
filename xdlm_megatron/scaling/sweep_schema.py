"""The knobs of a sweep: the section `sweep` that a recipe needs to be many."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass as section

from xdlm_megatron.config.derive import Derived
from xdlm_megatron.config.fields import STRICT, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from xdlm_megatron.scaling.ladder import BATCH_RULES, LR_RULES

Budgets = Annotated[list[PositiveFloat], Field(min_length=1)]


def _check_axis(values: Any) -> Any:
    cases = isinstance(values, dict) and all(isinstance(case, dict) for case in values.values())
    if not values or not (cases or isinstance(values, list)):
        raise ValueError("must be a list of values, or cases {name: {field: value}}; give at least one")
    return values


Axis = Annotated[Any, AfterValidator(_check_axis)]


@section(frozen=True, kw_only=True, config=STRICT)
class IsoFlops:
    kind: Literal["iso_flops"]
    """Every size spends every budget of FLOPs: valleys."""
    flops: Budgets
    """Training FLOPs of a run, full attention and head counted."""

    letter = "C"

    @property
    def budgets(self) -> list[float]:
        return self.flops

    def tokens(self, budget: float, figures: Derived) -> float:
        return budget / figures.flops_per_token


@section(frozen=True, kw_only=True, config=STRICT)
class TokensPerParameter:
    kind: Literal["tokens_per_parameter"]
    """Every size sees so many tokens for each of its parameters."""
    ratios: Budgets
    """Tokens per parameter, all parameters counted (Hoffmann et al. 2022: 20)."""

    letter = "R"

    @property
    def budgets(self) -> list[float]:
        return self.ratios

    def tokens(self, budget: float, figures: Derived) -> float:
        return budget * figures.num_parameters


@section(frozen=True, kw_only=True, config=STRICT)
class Tokens:
    kind: Literal["tokens"]
    """Every size sees every number of tokens: a grid."""
    numbers: Budgets
    """Training tokens of a run."""

    letter = "D"

    @property
    def budgets(self) -> list[float]:
        return self.numbers

    def tokens(self, budget: float, figures: Derived) -> float:
        return budget


Design = Annotated[IsoFlops | TokensPerParameter | Tokens, Field(discriminator="kind")]


@section(frozen=True, kw_only=True, config=STRICT)
class Sweep:
    sizes: dict[str, dict[str, Any]] | list[str]
    """Names of the ladder (scaling/ladder.py), or your own: name -> fields of `model`."""
    design: Design
    """How long each size trains: kind iso_flops, tokens_per_parameter or tokens."""
    steps: tuple[PositiveInt, PositiveInt] = (1, 10**9)
    """Fewest and most steps; a run that needs fewer or more is left out."""
    tokens_per_parameter: tuple[NonNegativeFloat, PositiveFloat] = (0.0, 1e9)
    """Fewest and most tokens per parameter; a run that sees fewer or more is left out."""
    axes: dict[str, Axis] = field(default_factory=dict)
    """Fields of the recipe and their values: every combination is run. Seeds: run.seed. Under a name of your
    own, cases that set several fields: {noise: {mdlm: {diffusion.uniform_ratio: 0}, ...}}."""
    batch: Literal["fixed", *BATCH_RULES] = "gidd"  # type: ignore[valid-type]
    """Tokens of a step: a rule of scaling/ladder.py; fixed: the recipe's train.global_batch_size."""
    lr: Literal["fixed", *LR_RULES] = "deepseek"  # type: ignore[valid-type]
    """Peak learning rate: a rule of scaling/ladder.py; fixed: the recipe's optimizer.lr."""
    warmup: Fraction = 0.02
    """Share of the steps that warm up."""
    decay: Fraction = 0.2
    """Share of the steps that decay, where lr_schedule.kind is wsd."""
    gpu: str | None = "h100"
    """GPU type (launch/gpus.py) for which the planner chooses each run's layout; null: the recipe's."""
    gpus: PositiveInt | dict[str, PositiveInt] | None = None
    """Processes of a run, one number or one a size; null: a node's GPUs, or the fewest without a type."""
    price: NonNegativeFloat = 0.0
    """Price of a GPU-hour, for the table."""
    max_jobs: PositiveInt = 16
    """Slurm jobs that run at the same time."""
    hours: PositiveFloat = 24.0
    """Time limit of a Slurm job; a longer run saves, requeues itself and goes on."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch, such as {partition: gpu, account: me}."""
