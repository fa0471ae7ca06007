"""A ladder of model sizes, and the rules that give each run its batch and its learning rate.

Sizes share widths with GIDD's (arXiv 2512.10858) and are of LLaMA's shape: SwiGLU of about 8/3 of the width,
heads of 64 to 128. The rules are published fits; each says where it stands and what it was fitted on. None
was fitted on XDLM: run a small sweep of `optimizer.lr` before a large ladder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """Shape of a model. The name says about how many parameters it has beside embedding and head."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int


LADDER: Mapping[str, Rung] = {
    "10m": Rung(6, 384, 1024, 6),
    "25m": Rung(8, 512, 1408, 8),
    "50m": Rung(10, 640, 1792, 10),
    "85m": Rung(12, 768, 2048, 12),
    "200m": Rung(16, 1024, 2816, 16),
    "400m": Rung(20, 1280, 3456, 20),
    "700m": Rung(24, 1536, 4096, 12),
    "1b": Rung(24, 2048, 5504, 16),
    "2b": Rung(28, 2560, 6912, 20),
    "4b": Rung(32, 3072, 8192, 24),
    "8b": Rung(40, 4096, 11008, 32),
}


@dataclass(frozen=True)
class Scale:
    """What a rule may look at. params: without embedding and head. tokens, flops: of the whole run."""

    params: float
    tokens: float
    flops: float


@dataclass(frozen=True)
class Rule:
    """A published power law. source: where it stands and what it was fitted on."""

    law: Callable[[Scale], float]
    formula: str
    source: str

    def __call__(self, scale: Scale) -> float:
        return self.law(scale)


# Peak learning rates of AdamW.
LR_RULES: Mapping[str, Rule] = {
    "deepseek": Rule(
        lambda s: 0.3118 * s.flops**-0.1250,
        "0.3118 C^-0.1250",
        "DeepSeek LLM, arXiv 2401.02954, eq. 1; autoregressive, 1e17 to 2e19 FLOPs",
    ),
    "step_law": Rule(
        lambda s: 1.79 * s.params**-0.713 * s.tokens**0.307,
        "1.79 N^-0.713 D^0.307",
        "Step Law, arXiv 2503.04715; autoregressive, N 60M to 1B without embeddings, D 2B to 100B",
    ),
}

# Tokens in a batch.
BATCH_RULES: Mapping[str, Rule] = {
    "gidd": Rule(
        lambda s: 10**-2.42 * s.tokens**0.815,
        "10^-2.42 D^0.815",
        "GIDD scaling, arXiv 2512.10858; masked to uniform diffusion, 25M to 567M, whatever the noise",
    ),
    "deepseek": Rule(
        lambda s: 0.2920 * s.flops**0.3271,
        "0.2920 C^0.3271",
        "DeepSeek LLM, arXiv 2401.02954, eq. 1; autoregressive, 1e17 to 2e19 FLOPs",
    ),
    "step_law": Rule(
        lambda s: 0.58 * s.tokens**0.571,
        "0.58 D^0.571",
        "Step Law, arXiv 2503.04715; autoregressive, D 2B to 100B",
    ),
}
