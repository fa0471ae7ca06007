"""The denoiser: Megatron-Core's embedding, transformer block and vocabulary-parallel head.

Shapes: B batch, S positions of this context-parallel rank, T of the whole sequence, H hidden,
P vocabulary shard (padded vocabulary / tensor-parallel size).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from xdlm_megatron.parallel.gpu_packages import FUSION, apex

EXTRA_STATE = "_extra_state"
FP8_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")  # those that have scales


class DiffusionLM(LanguageModule):
    """z_t -> logits of x_0, with full attention and no time input (the paper feeds a constant).

    One pipeline chunk of it: the first has the embedding, the last the final norm and the head. The loss is
    not in here. With causal layers and a `start_id` it is the autoregressive twin: x_0 -> logits of each of
    its tokens given those before it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block_spec: TransformerBlockSubmodules,
        padded_vocab_size: int,
        seq_length: int,
        groups: ProcessGroupCollection,
        is_first_stage: bool = True,
        is_last_stage: bool = True,
        chunk: int | None = None,
        share_embeddings_and_output_weights: bool = False,
        rotary_base: int = 10_000,
        start_id: int | None = None,
    ) -> None:
        """start_id: what the autoregressive twin reads before the first token; None: a denoiser."""
        super().__init__(config=config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder
        # Names that Megatron-Core's pipeline schedules and gradient finalisation read:
        self.pre_process = is_first_stage
        self.post_process = is_last_stage
        self.vp_stage = chunk
        self.start_id = start_id
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        if is_first_stage:
            self.embedding = LanguageModelEmbedding(
                config, padded_vocab_size, seq_length, position_embedding_type="rope", tp_group=groups.tp
            )
        self.rotary_pos_emb = RotaryEmbedding(
            config.kv_channels,
            rotary_percent=1.0,
            rotary_base=rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=groups.cp,
        )
        self.decoder = TransformerBlock(
            config,
            block_spec,
            pre_process=is_first_stage,
            post_process=is_last_stage,
            pg_collection=groups,
            vp_stage=chunk,
        )
        if is_last_stage:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded_vocab_size,
                config=_head_config(config),
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=is_first_stage and share_embeddings_and_output_weights,
                tp_group=groups.tp,
            )
        if is_first_stage or is_last_stage:
            self.setup_embeddings_and_output_layer()

    @property
    def autoregressive(self) -> bool:
        return self.start_id is not None

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """What the pipeline schedule received from the stage before, [S, B, H]."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The matrix that a tied model keeps in step between its first and last stage."""
        return self.embedding.word_embeddings.weight if self.pre_process else self.output_layer.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Upstream's, with no extra state but that of FP8's delayed scaling.

        Others are empty, and are others in every version and implementation.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        delayed = self.config.fp8 is not None and self.config.fp8_recipe == "delayed"
        kept = FP8_MODULES if delayed else ()
        return {
            name: value
            for name, value in state.items()
            if not name.endswith(EXTRA_STATE) or name.removesuffix(f".{EXTRA_STATE}").endswith(kept)
        }

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """torch's; FP8's scales start anew where `state_dict` has none, as of a model in bfloat16."""
        extra = {name: None for name in self.state_dict() if name.endswith(EXTRA_STATE)}
        return super().load_state_dict({**extra, **state_dict}, strict, assign)

    def head_weight(self) -> torch.Tensor:
        """This rank's rows [P, H] of the head, which may be the embedding's; last stage only."""
        own = self.output_layer.weight
        return self.embedding.word_embeddings.weight if own is None else own

    def forward(
        self, zt_BS: torch.Tensor, document_BT: torch.Tensor | None = None, without_head: bool = False
    ) -> torch.Tensor:
        """Logits [S, B, P] on the last stage, hidden [S, B, H] elsewhere (S / tp with sequence parallel).

        Args:
            zt_BS: this context-parallel rank's noisy token ids, int64; only its shape is read after the first
                stage.
            document_BT: number of the document of each position of the whole sequence, integers; attention
                and positions stay within one. None: the sequence is one.
            without_head: the last stage returns what the head multiplies, hidden [S, B, H] of the whole
                sequence on every tensor-parallel rank; backward sums its gradient over them.
        """
        if self.start_id is not None:
            zt_BS = moved_by_one(zt_BS, self.start_id, document_BT)
        hidden = self.embedding(input_ids=zt_BS, position_ids=None) if self.pre_process else None
        # Of the whole sequence, then our slice of it: upstream would cut the zig-zag that causal masks need.
        cp, S = self.pg_collection.cp, zt_BS.shape[1]
        here = slice(cp.rank() * S, (cp.rank() + 1) * S)
        rotary, mask = self.rotary_pos_emb(S * cp.size(), packed_seq=True), None
        if document_BT is None:
            rotary = rotary[here]
        else:
            rotary = rotary[positions_within(document_BT)[:, here].t(), 0]  # [S, B, 1, D]
            mask = (document_BT[:, here, None] != document_BT[:, None, :])[:, None]
        hidden = self.decoder(hidden_states=hidden, attention_mask=mask, rotary_pos_emb=rotary)
        if not self.post_process:
            return hidden
        if without_head:
            if self.output_layer.sequence_parallel:
                return tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
            return tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_SBP, _ = self.output_layer(hidden, weight=tied)
        return logits_SBP


def _head_config(config: TransformerConfig) -> TransformerConfig:
    """The head is Megatron-Core's own layer, which adds to the sum of gradients by apex or not at all."""
    if not config.gradient_accumulation_fusion or FUSION in apex().parts:
        return config
    plain = copy.copy(config)
    plain.gradient_accumulation_fusion = False
    return plain


def moved_by_one(ids_BS: torch.Tensor, start_id: int, document_BS: torch.Tensor | None) -> torch.Tensor:
    """int64 [B, S]: at each position the token before it, start_id where its document begins."""
    moved_BS = ids_BS.roll(1, dims=1)
    moved_BS[:, 0] = start_id
    if document_BS is None:
        return moved_BS
    return torch.where(positions_within(document_BS) == 0, start_id, moved_BS)


def positions_within(document_BT: torch.Tensor) -> torch.Tensor:
    """int64 [B, T]: each position counted from the start of its document."""
    position_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    starts_BT = document_BT.diff(dim=1, prepend=document_BT[:, :1] - 1) != 0
    return position_T - torch.where(starts_BT, position_T, 0).cummax(dim=1).values
