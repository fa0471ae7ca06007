"""What a study found, as Markdown: means over seeds with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from xdlm_megatron.study.collect import (
    AUTOREGRESSIVE,
    AccuracyRow,
    BoundRow,
    Interval,
    Results,
    SampleRow,
    over_seeds,
)

TIMES = (0.126, 0.326, 0.526, 0.725, 0.925)  # middles of bins
FEWEST_TOKENS = 200  # of one kind, bin of time and seed that a share is given of


def write_tables(results: Results, title: str, facts: Sequence[str]) -> str:
    """The whole page. facts: a line each, on how it was made."""
    parts = [f"# {title}", "\n".join(f"- {fact}" for fact in facts)]
    parts += ["## Likelihood", likelihood(results)]
    parts += ["## Samples", generation(results)]
    parts += ["## Differences to the first model, seed by seed", differences(results)]
    if results.accuracies:
        parts += ["## Reconstruction", reconstruction(results)]
    parts += ["## Over training", dynamics(results)]
    return "\n\n".join(parts) + "\n"


def models(results: Results) -> list[str]:
    """In the order of the sweep."""
    return list(dict.fromkeys(row.model for row in results.bounds))


def last_step(results: Results, model: str) -> int:
    return max(row.step for row in results.bounds if row.model == model)


def final_bounds(results: Results, model: str) -> list[BoundRow]:
    """A row a seed."""
    last = last_step(results, model)
    return [row for row in results.bounds if row.model == model and row.step == last]


def final_samples(results: Results, model: str) -> dict[int, list[SampleRow]]:
    """Of a model's last checkpoints: steps of its own sampler (0: no setting) -> a row a seed."""
    own = ("ancestral", "left_to_right")
    rows = [row for row in results.samples if row.model == model and row.sampler in own]
    found: dict[int, list[SampleRow]] = {}
    for row in rows:
        if row.step == last_step(results, model):
            found.setdefault(row.num_steps, []).append(row)
    return dict(sorted(found.items()))


def over(rows: Iterable[SampleRow], value: Callable[[SampleRow], float]) -> Interval:
    return over_seeds([value(row) for row in rows])


def likelihood(results: Results) -> str:
    lines = []
    for model in models(results):
        rows = final_bounds(results, model)
        bound, bits, window = (
            over_seeds([getattr(row, name) for row in rows]) for name in ("bound", "bits_per_byte", "window")
        )
        lines.append(
            [model, pm(bound, 3), pm(bits, 3), pm(window, 3), f"{math.exp(bound.mean):.2f}", str(len(rows))]
        )
    heads = ["model", "strict bound, nats a token", "bits a byte", "paper's window", "perplexity", "seeds"]
    return table(heads, lines)


def generation(results: Results) -> str:
    """Generative perplexity (intervals on the log scale), never without entropy and repetition."""
    lines = []
    for model in models(results):
        for steps, rows in final_samples(results, model).items():
            lines.append([model, str(steps) if steps else "a token each", *_of_samples(rows)])
        confident = dynamic_rows(results, model, "confidence", last_step(results, model))
        if confident:
            lines.append([model, f"{confident[0].num_steps}, by confidence", *_of_samples(confident)])
    if results.reference is not None:
        r = results.reference
        scores = _scores(Interval(r.nats, math.nan), Interval(r.bits_per_byte, math.nan))
        shares = f"{r.distinct_2:.3f}", f"{r.repeated_4:.4f}"
        lines.append(["held-out text", "", "", *scores, f"{r.entropy:.3f}", *shares, "1 %"])
    heads = [
        "model",
        "steps",
        "calls",
        "gen. perplexity",
        "bits a byte",
        "entropy",
        "dist-2",
        "rep-4",
        "low H",
    ]
    return table(heads, lines)


def _of_samples(rows: Sequence[SampleRow]) -> list[str]:
    """From calls on, over a row a seed."""
    return [
        f"{over(rows, lambda row: row.calls).mean:.3g}",
        *_scores(over(rows, lambda row: row.nats), over(rows, lambda row: row.bits_per_byte)),
        pm(over(rows, lambda row: row.entropy), 3),
        f"{over(rows, lambda row: row.distinct_2).mean:.3f}",
        f"{over(rows, lambda row: row.repeated_4).mean:.4f}",
        f"{over(rows, lambda row: row.low_entropy).mean:.1%}",
    ]


def differences(results: Results) -> str:
    """To the sweep's first model, paired by seed, for models of a seed share weights, data order and random
    numbers: bound in nats a token, samples in bits a byte under the scorer.
    """
    names = [name for name in models(results) if name != AUTOREGRESSIVE]
    lines = []
    for name in names[1:]:
        bounds = [{row.seed: row.bound for row in final_bounds(results, each)} for each in (names[0], name)]
        by_steps = [
            [{row.seed: row.bits_per_byte for row in rows} for rows in final_samples(results, each).values()]
            for each in (names[0], name)
        ]
        pairs = [bounds, *zip(*by_steps, strict=True)]
        lines.append([name, *(pm(_paired(first, other), 3) for first, other in pairs)])
    steps = final_samples(results, names[0])
    return table(["model", "strict bound", *(f"{number} steps" for number in steps)], lines)


def _paired(first: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    """Of the differences of equal seeds."""
    return over_seeds([other[seed] - first[seed] for seed in sorted(first.keys() & other.keys())])


def reconstruction(results: Results) -> str:
    """The share of right tokens at some times; nothing where there were too few of them."""
    lines = []
    for model in models(results):
        if model == AUTOREGRESSIVE:
            continue
        for kind in dict.fromkeys(row.kind for row in results.accuracies if row.model == model):
            cells = [_accuracy_at(results.accuracies, model, kind, t) for t in TIMES]
            lines.append([model, kind, *cells])
    page = table(["model", "token is", *(f"t = {t:g}" for t in TIMES)], lines)
    twin = next_token_accuracy(results)
    return (
        page if twin is None else f"{page}\n\nThe autoregressive twin's likeliest next token: {pm(twin, 3)}."
    )


def next_token_accuracy(results: Results) -> Interval | None:
    """Of the autoregressive twin, over all tokens."""
    rows = [row for row in results.accuracies if row.model == AUTOREGRESSIVE]
    seeds = sorted({row.seed for row in rows})
    if not seeds:
        return None
    return over_seeds(
        [
            sum(row.accuracy * row.tokens for row in rows if row.seed == seed)
            / sum(row.tokens for row in rows if row.seed == seed)
            for seed in seeds
        ]
    )


def dynamics(results: Results) -> str:
    """Bound, perplexity and order of generation at each checkpoint; the order of the models by each."""
    steps = sorted({row.step for row in results.bounds})
    lines = []
    for model in models(results):
        bounds = [
            over_seeds([row.bound for row in results.bounds if row.model == model and row.step == step])
            for step in steps
        ]
        lines.append([model, "strict bound", *(pm(bound, 3) for bound in bounds)])
        for sampler in ("left_to_right", "ancestral", "confidence"):
            by_step = [dynamic_rows(results, model, sampler, step) for step in steps]
            if not all(by_step):
                continue
            name = sampler.replace("_", " ")
            nats = [over(rows, lambda row: row.nats) for rows in by_step]
            lines.append([model, f"gen. perplexity, {name}", *(_scores(each)[0] for each in nats)])
            if sampler == "confidence":
                tau = [over(rows, lambda row: row.kendall_tau) for rows in by_step]
                lines.append([model, "Kendall's tau, confidence", *(pm(each, 3) for each in tau)])
    return table(["model", "", *(f"step {step}" for step in steps)], lines)


def dynamic_rows(results: Results, model: str, sampler: str, step: int) -> list[SampleRow]:
    """A row a seed, at the number of steps that every checkpoint was sampled with, if it is a setting."""
    key, numbers = (model, sampler, step), (0, results.dynamics_steps)
    return [r for r in results.samples if (r.model, r.sampler, r.step) == key and r.num_steps in numbers]


def pm(value: Interval, digits: int) -> str:
    """A dash where there is nothing to show."""
    if math.isnan(value.mean):
        return "-"
    half = "" if math.isnan(value.half) else f" ± {value.half:.{digits}f}"
    return f"{value.mean:.{digits}f}{half}"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))


def _scores(nats: Interval, bits: Interval | None = None) -> tuple[str, ...]:
    """Perplexity with its interval's ends, and bits; a dash where no scorer read the samples."""
    if math.isnan(nats.mean):
        return ("-",) if bits is None else ("-", "-")
    ends = (
        ""
        if math.isnan(nats.half)
        else (f" ({math.exp(nats.mean - nats.half):.0f} to {math.exp(nats.mean + nats.half):.0f})")
    )
    perplexity = f"{math.exp(nats.mean):.0f}{ends}"
    return (perplexity,) if bits is None else (perplexity, pm(bits, 3))


def _accuracy_at(rows: Sequence[AccuracyRow], model: str, kind: str, t: float) -> str:
    here = [r for r in rows if (r.model, r.kind) == (model, kind) and r.t_start <= t < r.t_end]
    enough = here and min(row.tokens for row in here) >= FEWEST_TOKENS
    return pm(over_seeds([row.accuracy for row in here]), 3) if enough else ""
