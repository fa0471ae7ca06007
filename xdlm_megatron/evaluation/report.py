"""What an evaluation found: lines to read, JSON records, the loss over time as a table and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdlm_megatron.checkpoint.integrity import fingerprint
from xdlm_megatron.config.load import to_tree
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.evaluation.bound import Bound, Evaluated, TimeBin
from xdlm_megatron.evaluation.choices import ChoiceResult
from xdlm_megatron.evaluation.reconstruction import Accuracy
from xdlm_megatron.evaluation.records import Estimate, write_record
from xdlm_megatron.tracking.plot import COLOURS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def checkpoint_record(config: RunConfig, path: Path, step: int, use_ema: bool) -> dict[str, Any]:
    """What every file of results says of the model that it is of."""
    return {
        "checkpoint": path.name,
        "checkpoint_hash": fingerprint(path),
        "step": step,
        "ema": use_ema,
        "diffusion": to_tree(config.diffusion),
        "sampling": to_tree(config.sampling),
        "seed": config.run.seed,
    }


@dataclass(frozen=True)
class Report:
    """Prints results and writes them beside each other. stem: of the files; model: checkpoint_record's."""

    config: RunConfig
    stem: Path
    model: dict[str, Any]

    def bounds(
        self,
        name: str,
        settings: dict[str, Any],
        found: Evaluated,
        accuracy: Sequence[Accuracy],
        entropy: float,
    ) -> None:
        """Of one text. name: goes behind the stem. accuracy: of reconstruction, if it was asked for.
        entropy: of the text's tokens, nats.
        """
        window, low = found.window, self.config.diffusion.t_min
        paper = Estimate(window.nelbo_per_token, window.standard_error)
        lines = [
            _bound_line("strict bound", found.bound),
            "    = " + " + ".join(f"{part} {_pm(value)}" for part, value in found.bound.parts.items()),
            f"  held-out NELBO {_pm(paper)} nats per token, perplexity {window.perplexity:.2f}: "
            f"the paper's, t in ({low:g}, 1) without the ends",
        ]
        if found.discrete is not None:
            lines.append(_bound_line(f"bound of {found.discrete.num_steps} sampling steps", found.discrete))
        lines.append(
            f"  over {window.num_sequences} sequences, {window.num_tokens} tokens; "
            f"their unigram entropy is {entropy:.4f} nats per token"
        )
        self._say(name, lines)
        found_record = {
            "bound": _bound_record(found.bound),
            "discrete": None if found.discrete is None else _bound_record(found.discrete),
            "nelbo_per_token": window.nelbo_per_token,
            "standard_error": window.standard_error,
            "perplexity": window.perplexity,
            "bits_per_byte": window.bits_per_byte,
            "num_sequences": window.num_sequences,
            "num_tokens": window.num_tokens,
            "unigram_entropy": entropy,
            "reconstruction": [_accuracy_record(each, bin_) for each in accuracy for bin_ in each.by_time],
        }
        self._write(name, self.model | settings | found_record)
        write_by_time(self._path(name, "-by_time.csv"), found.by_time)
        title = f"{self.config.run.name}, {self._path(name, '').name}"
        draw_by_time(self._path(name, "-by_time.png"), found.by_time, title)
        if accuracy:
            draw_reconstruction(self._path(name, "-reconstruction.png"), accuracy, title)

    def choices(self, name: str, settings: dict[str, Any], found: ChoiceResult) -> None:
        """Of one file of questions."""
        cut = settings["num_cut_prompts"]
        lines = [
            f"  accuracy {_pm(found.accuracy)}, per byte {_pm(found.accuracy_per_byte)}, "
            f"of {len(found.answers)} questions",
            f"  {found.undecided:.1%} of them are open: more draws of noise might change the answer",
            *([f"  {cut} prompts were too long and lost their beginning"] if cut else []),
        ]
        self._say(name, lines)
        answers = [
            {
                "nats": [value._asdict() for value in answer.nats],
                "chosen": answer.chosen,
                "chosen_per_byte": answer.chosen_per_byte,
                "undecided": answer.undecided,
            }
            for answer in found.answers
        ]
        found_record = {
            "accuracy": found.accuracy._asdict(),
            "accuracy_per_byte": found.accuracy_per_byte._asdict(),
            "undecided": found.undecided,
            "num_questions": len(found.answers),
            "answers": answers,
        }
        self._write(name, self.model | settings | found_record)

    def _path(self, name: str, ending: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}{name}{ending}")

    def _say(self, name: str, lines: list[str]) -> None:
        title = [] if not name else [f"{name[1:]}:"]
        print("\n".join([*title, *lines]), flush=True)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        path = self._path(name, ".json")
        write_record(path, record)
        print(f"  written to {path}", flush=True)


def _pm(value: Estimate) -> str:
    error = "" if value.standard_error < 5e-5 else f" +- {value.standard_error:.4f}"
    return f"{value.mean:.4f}{error}"


def _bound_line(name: str, bound: Bound) -> str:
    bits = "" if bound.bits_per_byte is None else f", {bound.bits_per_byte:.4f} bits per byte"
    return f"  {name} {_pm(bound.total)} nats per token, perplexity {bound.perplexity:.2f}{bits}"


def _bound_record(bound: Bound) -> dict[str, Any]:
    error = bound.total.standard_error
    in_bits = None if bound.bits_per_byte is None else bound.bits_per_byte * error / bound.total.mean
    return {
        "num_steps": bound.num_steps,
        "nats_per_token": bound.total.mean,
        "standard_error": error,
        "perplexity": bound.perplexity,
        "perplexity_standard_error": bound.perplexity * error,
        "bits_per_byte": bound.bits_per_byte,
        "bits_per_byte_standard_error": in_bits,
        "parts": {name: value._asdict() for name, value in bound.parts.items()},
    }


def _accuracy_record(found: Accuracy, bin_: TimeBin) -> dict[str, Any]:
    return {
        "kind": found.kind,
        "t_start": bin_.start,
        "t_end": bin_.end,
        "accuracy": bin_.value.mean,
        "standard_error": bin_.value.standard_error,
        "tokens": bin_.num_tokens,
    }


def write_by_time(path: Path, bins: Sequence[TimeBin]) -> None:
    """A line for each bin of t."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["t_start", "t_end", "nats_per_token_and_t", "standard_error", "tokens"])
        for each in bins:
            writer.writerow([f"{x:.6g}" for x in (each.start, each.end, *each.value)] + [each.num_tokens])


def draw_by_time(path: Path, bins: Sequence[TimeBin], title: str) -> None:
    """The density over t, whose mean is the held-out NELBO, with its standard errors."""
    with _axes_over_time(path, title) as axes:
        _draw_bins(axes, bins, COLOURS[0])
        axes.set_ylabel("nats per token and unit of t")


def draw_reconstruction(path: Path, accuracy: Sequence[Accuracy], title: str) -> None:
    """The share of right tokens over t, of each kind of what the network sees in their place."""
    with _axes_over_time(path, title) as axes:
        for colour, each in zip(COLOURS, accuracy, strict=False):
            _draw_bins(axes, each.by_time, colour, each.kind)
        axes.set_ylabel("likeliest token is right")
        axes.legend()


@contextmanager
def _axes_over_time(path: Path, title: str) -> Iterator[Axes]:
    """An empty figure over t, which is written when the block ends."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        yield axes
        axes.set_xlabel("t (0: text, 1: noise)")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left", fontsize=10)
        figure.savefig(path, dpi=150)


def _draw_bins(axes: Axes, bins: Sequence[TimeBin], colour: str, label: str | None = None) -> None:
    middle = [(each.start + each.end) / 2 for each in bins]
    mean = [each.value.mean for each in bins]
    error = [e if math.isfinite(e := each.value.standard_error) else 0.0 for each in bins]
    axes.errorbar(middle, mean, yerr=error, color=colour, marker="o", markersize=3, capsize=2, label=label)
