"""Sampling from a model that lives on several processes: the reverse loop runs on all of them in step.

Every process holds all ids and draws the same random numbers. Hidden states and logits stay where they are
made; what travels is a few bytes a drawn position, and ids.

Shape suffixes: B batch, S sequence, H hidden, P vocabulary shard, M chosen positions, C of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.posterior_draw import DrawShard, draw_shard
from xdlm_megatron.diffusion.sampler import Denoise, Pick, sample
from xdlm_megatron.diffusion.schedule import Schedule
from xdlm_megatron.model.build import unwrap
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.parallel.schedule import run_schedule

# Elements of the logits that exist at once: enough rows for a fast product, and little beside the weight.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How to sample; the fields are the command line's."""

    num_steps: int = 64
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    final: Literal["ancestral", "greedy", "none"] = "ancestral"
    seed: int = 1
    prompt: str | None = None
    trace_frames: int = 0


@dataclass(frozen=True)
class Samples:
    """ids [num_samples, S]; snapshots: (t, ids of the first sample [S]) from the prior to the end.

    num_function_evaluations: network calls for one sample.
    """

    ids: Tensor
    snapshots: list[tuple[float, Tensor]]
    num_function_evaluations: int


@dataclass(frozen=True)
class _Input:
    zt_BS: Tensor


def generate(
    denoise: Denoise,
    options: SampleOptions,
    noise: StationaryNoise,
    schedule: Schedule,
    seq_length: int,
    prompt_ids: list[int],
    device: torch.device,
    batch_size: int = 16,
    draw: DrawShard = draw_shard,
) -> Samples:
    """Ancestral sampling from the stationary law, with an optional prefix that never changes.

    batch_size: sequences that the network sees at once; a sample does not depend on it. draw: what reads the
    logits.

    Raises:
        ValueError: the prompt leaves no free position, or an option is out of range.
    """
    if options.num_samples < 1:
        raise ValueError(f"--num-samples {options.num_samples} must be >= 1; ask for one sample or more")
    if len(prompt_ids) >= seq_length:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens and data.seq_length is {seq_length}; shorten it"
        )
    observed_S = torch.full((seq_length,), -1, dtype=torch.int64, device=device)
    observed_S[: len(prompt_ids)] = torch.tensor(prompt_ids, dtype=torch.int64, device=device)
    position_S = torch.arange(seq_length, device=device)
    snapshots: list[tuple[float, Tensor]] = []
    batches = []
    for row_B in torch.arange(options.num_samples, device=device).split(batch_size):
        prior_BS = noise.sample_prior((options.seed, Stream.SAMPLE_PRIOR), (row_B[:, None], position_S))
        first = len(batches) == 0
        if first:
            snapshots.append((1.0, torch.where(observed_S < 0, prior_BS[0], observed_S)))

        def record(call: int, num_calls: int, t: float, zs_BS: Tensor, keep: bool = first) -> None:
            if keep:
                snapshots.append((t, zs_BS[0].clone()))

        ids_BS = sample(
            denoise,
            prior_BS,
            schedule,
            options.num_steps,
            noise,
            (options.seed, Stream.SAMPLE_STEP),
            observed_S.expand_as(prior_BS),
            final=options.final,
            temperature=options.temperature,
            top_p=options.top_p,
            row_id_B=row_B,
            on_step=record,
            draw=draw,
        )
        batches.append(ids_BS)
    return Samples(torch.cat(batches), snapshots, len(snapshots) - 1)


def build_denoiser(chunks: list[Any], mesh: Mesh) -> Callable[[Tensor], HeadPrediction]:
    """z_t [B, S] -> what the network makes of it, called on every process at once."""
    for chunk in chunks:
        chunk.eval()

    def forward_step(batches: Iterator[_Input], model: Any) -> tuple[Tensor, Any]:
        hidden = model(next(batches).zt_BS, None, True)  # no documents, no head
        return hidden, lambda hidden_SBH, non_loss_data: (hidden_SBH, unwrap(model).head_weight())

    @torch.no_grad()
    def denoise(zt_BS: Tensor) -> HeadPrediction:
        own_BS = zt_BS[:, mesh.sequence_slice(zt_BS.shape[1])]
        outputs = run_schedule(
            forward_step,
            chunks,
            batches=lambda: iter([_Input(own_BS)] * num_microbatches),
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
class HeadPrediction:
    """A network's output before its head: hidden [S, B, H] of this process's positions and its rows [P, H] of
    the head, on the last pipeline stage; None elsewhere. Logits are made of the rows that are asked for.
    """

    mesh: Mesh
    hidden_SBH: Tensor | None
    weight_PH: Tensor | None

    @torch.no_grad()
    def replace(self, ids_BS: Tensor, chosen_BS: Tensor, pick: Pick) -> Tensor:
        """As sampler.Prediction's. Context-parallel ranks pick at their own positions and exchange the ids;
        the other pipeline stages receive them.
        """
        groups = self.mesh.groups
        ids_BS = ids_BS.clone()
        if self.hidden_SBH is not None and self.weight_PH is not None:
            own = self.mesh.sequence_slice(ids_BS.shape[1])
            row_M, column_M = chosen_BS[:, own].nonzero(as_tuple=True)
            hidden_MH = self.hidden_SBH[column_M, row_M]
            group = groups.tp if groups.tp.size() > 1 else None
            at_M = row_M * ids_BS.shape[1] + column_M + own.start
            tokens = max(1, CHUNK_ELEMENTS.get(hidden_MH.device.type, 1 << 26) // len(self.weight_PH))
            for at_C, hidden_CH in zip(at_M.split(tokens), hidden_MH.split(tokens), strict=True):
                index_C = torch.arange(len(at_C), device=at_C.device)
                ids_BS.view(-1)[at_C] = pick(at_C, hidden_CH @ self.weight_PH.t(), index_C, group)
            if groups.cp.size() > 1:
                share_BS = ids_BS[:, own].contiguous()
                shares = [torch.empty_like(share_BS) for _ in range(groups.cp.size())]
                dist.all_gather(shares, share_BS, group=groups.cp)
                ids_BS = torch.cat(shares, dim=1)
        if groups.pp.size() > 1:
            dist.broadcast(ids_BS, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
        return ids_BS
