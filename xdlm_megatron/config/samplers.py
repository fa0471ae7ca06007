"""The section `sampling` of a recipe: every sampler's knobs, told apart by `kind` (docs/sampling.md)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag
from pydantic.dataclasses import dataclass as section

from xdlm_megatron.config.fields import (
    STRICT,
    NonNegativeFloat,
    OpenFraction,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Probability,
)


@section(frozen=True, kw_only=True, config=STRICT)
class AnySampler:
    """What every sampler has; each `kind` is described in docs/sampling.md."""

    temperature: NonNegativeFloat = 1.0
    """Of the predicted law; 0 takes the likeliest token (LLaDA and Saber are published with 0)."""
    top_p: PositiveFraction = 1.0
    """Draw among the most probable tokens whose cumulative probability stays within it; 1: all."""
    guidance_scale: NonNegativeFloat = 0.0
    """Classifier-free guidance towards the observed tokens, at twice the network calls; 0: none."""
    block_size: PositiveInt | None = None
    """Sample this many positions after the others, from left to right; None: all at once."""


@section(frozen=True, kw_only=True, config=STRICT)
class AncestralSampler(AnySampler):
    kind: Literal["ancestral"] = "ancestral"
    """The reverse process: draws from p_theta(z_s | z_t)."""
    num_steps: PositiveInt = 64
    """Reverse steps (of each block)."""
    final: Literal["ancestral", "greedy", "none"] = "ancestral"
    """Removal of the last noise: ancestral (a draw at t = 0), greedy (the likeliest tokens), or none."""
    t_end: OpenFraction = 1e-5
    """Time of the last step (the paper's 1e-5)."""
    temperature: PositiveFloat = 1.0
    """Of the predicted law, before the posterior is made of it."""


@section(frozen=True, kw_only=True, config=STRICT)
class ConfidenceSampler(AnySampler):
    kind: Literal["confidence"]
    """LLaDA's low-confidence re-masking: from all masks, the surest tokens first."""
    num_steps: PositiveInt = 64
    """Steps (of each block), over which the masks are split evenly."""


@section(frozen=True, kw_only=True, config=STRICT)
class RefineSampler(AnySampler):
    kind: Literal["refine"]
    """LLaDA-XDLM's: fills masks as `confidence` does, and overwrites tokens with likelier ones."""
    num_steps: PositiveInt = 64
    """Steps (of each block), over which the masks are split evenly."""
    refine_ratio: Probability | None = None
    """k, for k / (1 - k) refinements a filled mask; None: diffusion.uniform_ratio."""


@section(frozen=True, kw_only=True, config=STRICT)
class RemdmSampler(AnySampler):
    kind: Literal["remdm"]
    """ReMDM: the reverse process of mask noise, with tokens masked again at random."""
    num_steps: PositiveInt = 64
    """Steps (of each block) of t from 1 to 0."""
    strategy: Literal["cap", "rescale", "conf"] = "cap"
    """Probability of masking again: cap (at most eta), rescale (eta of the largest), conf (cap, by doubt)."""
    eta: PositiveFraction = 0.02
    """See strategy."""
    remask_below_t: PositiveFraction = 1.0
    """Mask again from this time on, on the way from 1 to 0 (ReMDM-switch); 1: always."""


@section(frozen=True, kw_only=True, config=STRICT)
class RemdmLoopSampler(AnySampler):
    kind: Literal["remdm_loop"]
    """ReMDM-loop: fills to a share of tokens, masks and fills again at that share, then fills the rest."""
    num_steps: PositiveInt = 64
    """Steps (of each block) of t from 1 to 0."""
    eta: PositiveFraction = 0.02
    """Probability of masking a token again in a step of the loop."""
    t_on: OpenFraction = 0.55
    """Time at which the loop begins; above t_off."""
    t_off: OpenFraction = 0.05
    """Time at which it ends."""
    alpha_on: OpenFraction = 0.9
    """Share of tokens that are in sight during the loop."""


@section(frozen=True, kw_only=True, config=STRICT)
class SaberSampler(AnySampler):
    kind: Literal["saber"]
    """Saber: keeps what is surer than the average so far, takes back what has become doubtful."""
    variant: Literal["release", "paper"] = "release"
    """What is taken back: by the rule of the released code (release), or of the text (paper)."""
    min_tokens: PositiveInt = 2
    """Tokens that a step keeps at least (n)."""
    backtrack_every: PositiveInt = 8
    """Tokens kept for each one that is taken back (mu)."""


@section(frozen=True, kw_only=True, config=STRICT)
class LeftToRightSampler(AnySampler):
    kind: Literal["left_to_right"]
    """One token a step, from left to right: what an autoregressive model needs, and a denoiser may try."""


def _kind_or_ancestral(value: Any) -> Any:  # sampling.num_steps=8 alone is a section
    return value.get("kind", "ancestral") if isinstance(value, dict) else getattr(value, "kind", None)


Sampler = Annotated[
    Annotated[AncestralSampler, Tag("ancestral")]
    | Annotated[ConfidenceSampler, Tag("confidence")]
    | Annotated[RefineSampler, Tag("refine")]
    | Annotated[RemdmSampler, Tag("remdm")]
    | Annotated[RemdmLoopSampler, Tag("remdm_loop")]
    | Annotated[SaberSampler, Tag("saber")]
    | Annotated[LeftToRightSampler, Tag("left_to_right")],
    Discriminator(_kind_or_ancestral),
]
