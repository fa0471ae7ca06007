"""The row operations of diffusion/row_ops.py by the kernels of csrc/nelbo.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import RowOps, Shard, Tokens
from xdlm_megatron.kernels.library import Library, rows_of


def nelbo_row_ops(library: Library) -> RowOps:
    """RowOps whose tensors lie on the library's device. Logits: float32 or bfloat16, of any alignment."""
    kernels = NelboKernels(library)
    split = (kernels.stats, kernels.merge, kernels.sums, kernels.finish, kernels.grad)
    return RowOps(*split, whole=kernels.whole, rescale=kernels.rescale)


class NelboKernels:
    """The operations, with what only tests and the probe ask for."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def stats(self, logits_NP: Tensor, tokens: Tokens, shard: Shard) -> Tensor:
        stats_4N = tokens.alpha_N.new_empty(4, len(tokens))
        self._call("xdlm_nelbo_stats", logits_NP, tokens, shard, stats_4N)
        return stats_4N

    def merge(self, stats_R4N: Tensor, tokens: Tokens, noise: StationaryNoise) -> Tensor:
        merged_5N = stats_R4N.new_empty(5, len(tokens))
        self._call("xdlm_nelbo_merge", None, tokens, Shard(noise), stats_R4N, len(stats_R4N), merged_5N)
        return merged_5N

    def sums(self, logits_NP: Tensor, tokens: Tokens, merged_5N: Tensor, shard: Shard) -> Tensor:
        sums_2N = merged_5N.new_empty(2, len(tokens))
        self._call("xdlm_nelbo_sums", logits_NP, tokens, shard, merged_5N, sums_2N)
        return sums_2N

    def finish(
        self, merged_5N: Tensor, sums_R2N: Tensor | None, tokens: Tokens, noise: StationaryNoise
    ) -> tuple[Tensor, Tensor]:
        loss_N, terms_6N = merged_5N.new_empty(len(tokens)), merged_5N.new_empty(6, len(tokens))
        ranks = 1 if sums_R2N is None else len(sums_R2N)
        sums = (merged_5N, sums_R2N, ranks, loss_N, terms_6N)
        self._call("xdlm_nelbo_finish", None, tokens, Shard(noise), *sums)
        return loss_N, terms_6N

    def grad(
        self,
        logits_NP: Tensor,
        tokens: Tokens,
        terms_6N: Tensor,
        upstream_N: Tensor | None,
        shard: Shard,
        out_NP: Tensor,
    ) -> None:
        _check_out(out_NP, logits_NP)
        if upstream_N is not None:
            upstream_N = upstream_N.to(torch.float32).contiguous()
        arguments = (terms_6N.contiguous(), upstream_N, out_NP, out_NP.stride(0))
        self._call("xdlm_nelbo_grad", logits_NP, tokens, shard, *arguments)

    def whole(
        self, logits_NP: Tensor, tokens: Tokens, shard: Shard, out_NP: Tensor | None, cluster: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """cluster: blocks a row; 0 takes the fewest that it fits."""
        device = logits_NP.device
        rows = rows_of(logits_NP, tokens, shard)
        if not (cluster or self._library.ask("xdlm_nelbo_cluster", device, rows)):
            return None
        if out_NP is not None:
            _check_out(out_NP, logits_NP)
        loss_N, terms_6N = tokens.alpha_N.new_empty(len(tokens)), tokens.alpha_N.new_empty(6, len(tokens))
        out = (out_NP, 0 if out_NP is None else out_NP.stride(0))
        self._call("xdlm_nelbo_whole", logits_NP, tokens, shard, loss_N, terms_6N, *out, cluster)
        return loss_N, terms_6N

    def rescale(self, grad_NP: Tensor, tokens: Tokens, upstream_N: Tensor, shard: Shard) -> None:
        upstream_N = upstream_N.to(torch.float32).contiguous()
        self._call("xdlm_nelbo_rescale", grad_NP, tokens, shard, upstream_N, grad_NP)

    def _call(
        self, name: str, logits_NP: Tensor | None, tokens: Tokens, shard: Shard, *arguments: object
    ) -> None:
        device = tokens.alpha_N.device
        if device.type != self._library.device_type:
            raise ValueError(
                f"tensors on {device}: {self._library.path.name} takes {self._library.device_type}"
            )
        # what works on tokens alone reads no logits
        logits_NP = tokens.alpha_N[:, None] if logits_NP is None else logits_NP
        self._library.call(name, device, rows_of(logits_NP, tokens, shard), *arguments)


def _check_out(out_NP: Tensor, logits_NP: Tensor) -> None:
    if out_NP.dtype != logits_NP.dtype or (out_NP.shape[1] > 1 and out_NP.stride(1) != 1):
        raise ValueError(
            f"out: {out_NP.dtype} with strides {out_NP.stride()}; as the logits, columns contiguous"
        )
