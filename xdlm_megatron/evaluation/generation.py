"""Sampling from a model that lives on several processes: the reverse loop runs on all of them in step.

Every process holds all ids and draws the same random numbers. Hidden states and logits stay where they are
made; what travels is a few bytes a drawn position, and ids.

Shape suffixes: B batch, S sequence, H hidden, P vocabulary shard, M chosen positions, C of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.config.samplers import AnySampler
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.prediction import Denoise, Pick, Prediction
from xdlm_megatron.diffusion.schedule import Schedule
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, Draw
from xdlm_megatron.model.build import unwrap
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.parallel.schedule import run_schedule
from xdlm_megatron.samplers import sample

# Elements of the logits that exist at once: enough rows for a fast product, and little beside the weight.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What to sample; how is the recipe's `sampling`. The fields are the command line's."""

    num_samples: int = 1
    seed: int = 1
    prompt: str | None = None
    suffix: str | None = None
    trace_frames: int = 0


@dataclass(frozen=True)
class Samples:
    """ids [N, S], N = num_samples; snapshots: (t, ids of the first sample [S]) from the start to the end.

    evaluations, steps: int64 [N], network calls that each sample needed, and steps that its sampler took.
    last_change: int64 [N, S], the step (from 1) that last changed a position, 0 for observed ones.
    """

    ids: Tensor
    snapshots: list[tuple[float, Tensor]]
    evaluations: Tensor
    steps: Tensor
    last_change: Tensor


@dataclass(frozen=True)
class _Input:
    zt_BS: Tensor
    document_BT: Tensor | None


def observe(seq_length: int, prompt_ids: list[int], suffix_ids: list[int], device: torch.device) -> Tensor:
    """int64 [seq_length]: what the sample begins and ends with, -1 between. ValueError where no room is
    left.
    """
    given = len(prompt_ids) + len(suffix_ids)
    if given >= seq_length:
        raise ValueError(
            f"prompt and suffix have {given} tokens and data.seq_length is {seq_length}; shorten them"
        )
    unknown = [-1] * (seq_length - given)
    return torch.tensor([*prompt_ids, *unknown, *suffix_ids], dtype=torch.int64, device=device)


def generate(
    denoise: Denoise,
    options: SampleOptions,
    settings: AnySampler,
    noise: StationaryNoise,
    schedule: Schedule,
    observed_S: Tensor,
    batch_size: int = 16,
    draw: Draw = REFERENCE_DRAW,
) -> Samples:
    """options.num_samples fillings of observed_S (int64 ids, -1 where unknown) by the sampler of `settings`.

    batch_size: sequences that the network sees at once; a sample does not depend on it. draw: what reads the
    logits. Raises ValueError where `sample` does.
    """
    if options.num_samples < 1:
        raise ValueError(f"--num-samples {options.num_samples} must be >= 1; ask for one sample or more")
    snapshots: list[tuple[float, Tensor]] = []
    batches = []
    for row_B in torch.arange(options.num_samples, device=observed_S.device).split(batch_size):
        first = not batches

        def record(t: float, z_BS: Tensor, keep: bool = first) -> None:
            if keep:
                snapshots.append((t, z_BS[0].clone()))

        batches.append(
            sample(
                denoise,
                settings,
                noise,
                schedule,
                options.seed,
                observed_S.expand(len(row_B), -1),
                row_B,
                draw=draw,
                on_step=record,
            )
        )
    return Samples(
        torch.cat([batch.ids_BS for batch in batches]),
        snapshots[: 1 + int(batches[0].steps_B[0])],  # others of its batch may have taken more steps
        torch.cat([batch.evaluations_B for batch in batches]),
        torch.cat([batch.steps_B for batch in batches]),
        torch.cat([batch.last_change_BS for batch in batches]),
    )


def build_denoiser(
    chunks: list[Any], mesh: Mesh, document_BT: Tensor | None = None
) -> Callable[[Tensor], HeadPrediction]:
    """z_t [B, S] -> what the network makes of it, called on every process at once. document_BT: numbers of
    documents that do not see each other, of such a batch; None: each sample is one.
    """
    for chunk in chunks:
        chunk.eval()

    def forward_step(batches: Iterator[_Input], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        hidden = model(batch.zt_BS, batch.document_BT, True)  # without the head
        return hidden, lambda hidden_SBH, non_loss_data: (hidden_SBH, unwrap(model).head_weight())

    @torch.no_grad()
    def denoise(zt_BS: Tensor) -> HeadPrediction:
        own_BS = zt_BS[:, mesh.sequence_slice(zt_BS.shape[1])]
        outputs = run_schedule(
            forward_step,
            chunks,
            batches=lambda: iter([_Input(own_BS, document_BT)] * num_microbatches),
            num_microbatches=num_microbatches,
            micro_batch_size=zt_BS.shape[0],
            seq_length=zt_BS.shape[1],
            forward_only=True,
            collect_outputs=True,
        )
        return HeadPrediction(mesh, *(outputs[0] if outputs else (None, None)))

    # Interleaved pipelines take micro-batches in multiples of their stages; the repeats are not looked at.
    num_microbatches = mesh.groups.pp.size() if mesh.virtual_pipeline_size else 1
    return denoise


@dataclass(frozen=True)
class HeadPrediction(Prediction):
    """A network's output before its head: hidden [S, B, H] of this process's positions and its rows [P, H] of
    the head, on the last pipeline stage; None elsewhere. Logits are made of the rows that are asked for.
    """

    mesh: Mesh
    hidden_SBH: Tensor | None
    weight_PH: Tensor | None

    @torch.no_grad()
    def read(self, chosen_BS: Tensor, pick: Pick, num_values: int = 1) -> Tensor:
        """Context-parallel ranks ask about their own positions and exchange what they hear; the other
        pipeline stages receive it.
        """
        groups, S = self.mesh.groups, chosen_BS.shape[1]
        values_KBS = torch.zeros(num_values, *chosen_BS.shape, dtype=torch.float64, device=chosen_BS.device)
        if self.hidden_SBH is not None and self.weight_PH is not None:
            own = self.mesh.sequence_slice(S)
            row_M, column_M = chosen_BS[:, own].nonzero(as_tuple=True)
            hidden_MH = self.hidden_SBH[column_M, row_M]
            group = groups.tp if groups.tp.size() > 1 else None
            at_M = row_M * S + column_M + own.start
            tokens = max(1, CHUNK_ELEMENTS.get(hidden_MH.device.type, 1 << 26) // len(self.weight_PH))
            for at_C, hidden_CH in zip(at_M.split(tokens), hidden_MH.split(tokens), strict=True):
                index_C = torch.arange(len(at_C), device=at_C.device)
                picked = pick(at_C, hidden_CH @ self.weight_PH.t(), index_C, group)
                values_KBS.view(num_values, -1)[:, at_C] = picked.double()
            if groups.cp.size() > 1:
                share_KBS = values_KBS[..., own].contiguous()
                shares = [torch.empty_like(share_KBS) for _ in range(groups.cp.size())]
                dist.all_gather(shares, share_KBS, group=groups.cp)
                values_KBS = torch.cat(shares, dim=-1)
        if groups.pp.size() > 1:
            dist.broadcast(values_KBS, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
        return values_KBS

    def guided(self, unconditional: HeadPrediction, scale: float) -> HeadPrediction:
        """The head is linear: mixed hidden states have mixed logits, of one product."""
        if self.hidden_SBH is None or unconditional.hidden_SBH is None:
            return self
        mixed_SBH = self.hidden_SBH + scale * (self.hidden_SBH - unconditional.hidden_SBH)
        return HeadPrediction(self.mesh, mixed_SBH, self.weight_PH)
