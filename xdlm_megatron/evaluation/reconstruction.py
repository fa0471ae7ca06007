"""How often the likeliest token is the right one, by noise level and by what the network sees in its place.

Shape suffixes: B micro-batch, S sequence, N tokens, P vocabulary shard, R rows, K kinds, T bins of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from xdlm_megatron.data.batch import Batch
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.shard_rows import best_shard, winner_of_ranks
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks, shard_of
from xdlm_megatron.evaluation.bound import NUM_BINS, TimeBin, bin_of, bins_of
from xdlm_megatron.evaluation.nelbo import NelboEvaluator
from xdlm_megatron.model.objective import seen_and_asked
from xdlm_megatron.parallel.mesh import Mesh

KINDS = ("masked", "replaced", "kept")


class Accuracy(NamedTuple):
    """Of the tokens of one kind; the bins' means are shares of right answers."""

    kind: str
    by_time: list[TimeBin]


@dataclass(frozen=True)
class ReconstructionObjective:
    """Counts of right answers as `forward_step_func` of Megatron's schedules; reports float64 [B, K, T].

    Kinds: masked, replaced by another token, and kept as it was, which the network does not know. Without
    uniform noise it is asked about masks alone, for the rest is given.
    """

    reports: ClassVar[dict[str, tuple[int, ...]]] = {
        "right": (len(KINDS), NUM_BINS),
        "asked": (len(KINDS), NUM_BINS),
    }

    noise: StationaryNoise
    mesh: Mesh
    t_min: float

    def forward_step(
        self, batches: Iterator[Batch], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        seen_BS, batch = seen_and_asked(next(batches), model, self.noise)

        def loss_function(logits_SBP: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            right_BS = self._likeliest(logits_SBP.transpose(0, 1)) == batch.x0_BS
            place_BS = self._kind(batch) * NUM_BINS + bin_of(batch.t_BS, self.t_min)
            asked_BS = batch.scored_BS.clone()
            if self.noise.uniform_ratio == 0:
                asked_BS &= self.noise.is_mask(batch.zt_BS)
            counts = {
                name: self._count(place_BS, counted_BS)
                for name, counted_BS in (("right", right_BS & asked_BS), ("asked", asked_BS))
            }
            return right_BS.sum(), asked_BS.sum(dtype=torch.int), counts

        return model(seen_BS, batch.document_BT), loss_function

    def _likeliest(self, logits_BSP: Tensor) -> Tensor:
        """int64 [B, S]: the likeliest tokens, the lowest id of equals."""
        tp = self.mesh.groups.tp
        group = tp if tp.size() > 1 else None
        logits_NP = logits_BSP.flatten(0, 1)
        shard = shard_of(logits_NP.shape[1], self.noise, group)
        index_N = torch.arange(len(logits_NP), device=logits_NP.device)
        best_2N = best_shard(logits_NP, index_N, shard)
        return winner_of_ranks(gather_ranks(best_2N, group))[1].view(logits_BSP.shape[:2])

    def _kind(self, batch: Any) -> Tensor:
        """int64 [B, S]: index into KINDS. In uniform noise the mask's id is a token as any other."""
        masked_BS = self.noise.is_mask(batch.zt_BS) & (self.noise.uniform_ratio < 1)
        return torch.where(masked_BS, 0, torch.where(batch.zt_BS != batch.x0_BS, 1, 2))

    @staticmethod
    def _count(place_BS: Tensor, counted_BS: Tensor) -> Tensor:
        """float64 [B, K, T]."""
        nothing = torch.zeros(
            len(place_BS), len(KINDS) * NUM_BINS, dtype=torch.float64, device=place_BS.device
        )
        return nothing.scatter_add(1, place_BS, counted_BS.double()).view(-1, len(KINDS), NUM_BINS)


def reconstruction(evaluator: NelboEvaluator, chunks: list[Any]) -> list[Accuracy]:
    """Of the evaluator's rows, times and noise. All processes call it; all get the result.

    An autoregressive model is asked about every next token; its times mean nothing.
    """
    samples = evaluator.samples
    objective = ReconstructionObjective(samples.noise, evaluator.mesh, samples.t_min)
    rows = evaluator.terms(chunks).reported(objective)
    found = [
        Accuracy(kind, bins_of(rows["right"][:, index], rows["asked"][:, index], samples.t_min))
        for index, kind in enumerate(KINDS)
    ]
    return [accuracy for accuracy in found if accuracy.by_time]
