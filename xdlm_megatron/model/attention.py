"""Attention on torch's scaled_dot_product_attention, full or causal: no [S, S] scores are kept.

Shapes: S positions of this context-parallel rank, T of the whole sequence, B batch,
N query heads of this rank, G key/value heads of this rank, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class SDPAttention(MegatronModule):
    """Megatron-Core's `core_attention`: full or causal, grouped queries, context parallel, on CPU and CUDA.

    Upstream's local DotProductAttention keeps the [B, N, S, S] scores; the flash or memory-efficient kernels
    behind SDPA do not (on a CPU, attention dropout still makes them).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.causal = attn_mask_type is AttnMaskType.causal
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Returns [S, B, N * D], in the queries' dtype.

        attention_mask: bool [B, 1, S, T], True where a key is hidden (Megatron's sense); None hides nothing.
        """
        S, B, N, D = query_SBND.shape
        if self.context_group is not None:  # rotated already, so every slice may see them as they come
            gather = tensor_parallel.gather_from_sequence_parallel_region
            key_SBGD = gather(key_SBGD, group=self.context_group)
            value_SBGD = gather(value_SBGD, group=self.context_group)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        if query.is_cuda and query.dtype is torch.float32 and key.shape[1] != N:
            # Only the scores-keeping kernel takes grouped queries in float32 there.
            key, value = (x.repeat_interleave(N // x.shape[1], dim=1) for x in (key, value))
        allowed = None if attention_mask is None else ~attention_mask
        if self.causal and allowed is not None:  # torch takes a mask or the flag
            allowed = allowed.tril()
        attend = functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            query,
            key,
            value,
            attn_mask=allowed,
            is_causal=self.causal and allowed is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != N,
        )
        if self.training and self.dropout:
            # Heads are split over ranks, so each rank draws from its own stream.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                out_BNSD = attend(dropout_p=self.dropout)
        else:
            out_BNSD = attend()
        return out_BNSD.permute(2, 0, 1, 3).reshape(S, B, N * D)
