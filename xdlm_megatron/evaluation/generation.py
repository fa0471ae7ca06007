"""Sampling from a model that lives on several processes: the reverse loop runs on all of them in step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.sampler import sample
from xdlm_megatron.diffusion.schedule import Schedule
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.parallel.schedule import run_schedule


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
    denoise: Callable[[Tensor], Tensor],
    options: SampleOptions,
    noise: StationaryNoise,
    schedule: Schedule,
    seq_length: int,
    prompt_ids: list[int],
    device: torch.device,
    batch_size: int = 16,
) -> Samples:
    """Ancestral sampling from the stationary law, with an optional prefix that never changes.

    batch_size: sequences that the network sees at once; a sample does not depend on it.

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
        )
        batches.append(ids_BS)
    return Samples(torch.cat(batches), snapshots, len(snapshots) - 1)


def build_denoiser(chunks: list[Any], mesh: Mesh, vocab_size: int) -> Callable[[Tensor], Tensor]:
    """z_t [B, S] -> logits [B, S, V], the same on every process.

    Logits are gathered over the tensor- and context-parallel groups and broadcast from the last pipeline
    stage, so each process draws the same tokens from the same counters without further messages.
    """
    for chunk in chunks:
        chunk.eval()

    def forward_step(batches: Iterator[_Input], model: Any) -> tuple[Tensor, Any]:
        return model(next(batches).zt_BS), lambda logits_SBP, non_loss_data: logits_SBP

    @torch.no_grad()
    def denoise(zt_BS: Tensor) -> Tensor:
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
        return _share_logits(outputs[0] if outputs else None, zt_BS, mesh, vocab_size)

    # Interleaved pipelines take micro-batches in multiples of their stages; the repeats are not looked at.
    num_microbatches = mesh.groups.pp.size() if mesh.virtual_pipeline_size else 1
    return denoise


def _share_logits(logits_SBP: Tensor | None, zt_BS: Tensor, mesh: Mesh, vocab_size: int) -> Tensor:
    groups = mesh.groups
    if logits_SBP is not None:
        logits_SBV = _gather(logits_SBP, groups.tp, dim=-1)[..., :vocab_size].float()
        logits_BSV = _gather(logits_SBV, groups.cp, dim=0).transpose(0, 1).contiguous()
    else:
        logits_BSV = torch.empty(*zt_BS.shape, vocab_size, device=zt_BS.device)
    if groups.pp.size() > 1:
        dist.broadcast(logits_BSV, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
    return logits_BSV


def _gather(shard: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    if group.size() == 1:
        return shard
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard, group=group)
    return torch.cat(shards, dim=dim)
