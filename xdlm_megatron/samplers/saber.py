"""Saber (arXiv 2510.18165): as many tokens a step as are surer than the average so far, and some taken back.

A step keeps every mask's token whose probability is above the mean of those kept before, each when it was
kept, and at least min_tokens. Then it masks some tokens again: the more it kept, the more.

Paper and released code (github.com/zhaoyMa/Saber, decoding.py) differ in what is taken back:
* `paper`: of tokens kept before this step, those whose own probability fell most since the step before;
  max(1, kept // backtrack_every).
* `release`: of all tokens, those just kept included, those where the probability of the token that the
  network would put there now, be it the present one or not, rose least; max(min_tokens // 2,
  ceil(kept / backtrack_every)). Tokens that were taken back still count in the mean.
Both take back less than the step kept, so that a row of n masks is done in n steps at most.
"""

import torch

from xdlm_megatron.config.samplers import SaberSampler
from xdlm_megatron.samplers.chain import Chain
from xdlm_megatron.samplers.confidence import highest


def saber(chain: Chain, settings: SaberSampler) -> None:
    """Steps until no mask is left; there is no number of steps to choose."""
    chain.begin(masks=True)
    paper, n = settings.variant == "paper", settings.min_tokens
    when_kept_BS = torch.full_like(chain.z_BS, torch.nan, dtype=torch.float64)
    before_BS = torch.zeros_like(when_kept_BS)
    num_free = max(1, int(chain.free_BS.sum()))
    while chain.masked_BS.any():
        masked_BS, active_B = chain.masked_BS, chain.masked_BS.any(1)
        visible_BS = chain.free_BS & ~masked_BS
        asked_BS = chain.free_BS & active_B[:, None]
        token_BS, sure_BS, p_present_BS = chain.tokens(asked_BS, settings.temperature, settings.top_p)
        kept_BS = masked_BS & (sure_BS > when_kept_BS.nanmean(1, keepdim=True).nan_to_num(1.0))
        kept_BS = kept_BS | highest(sure_BS, masked_BS, torch.full_like(chain.row_B, n))
        kept_B = kept_BS.sum(1)
        when_kept_BS = torch.where(kept_BS, sure_BS, when_kept_BS)

        now_BS = torch.where(visible_BS, p_present_BS, sure_BS) if paper else sure_BS
        among_BS = visible_BS if paper else visible_BS | kept_BS
        count_B = (
            (kept_B // settings.backtrack_every).clamp_min(1)
            if paper
            else (-(-kept_B // settings.backtrack_every)).clamp_min(n // 2)
        )
        unfinished_B = active_B & (kept_B < masked_BS.sum(1))
        count_B = torch.minimum(count_B, kept_B - 1) * unfinished_B
        back_BS = highest(before_BS - now_BS, among_BS, count_B)
        before_BS = now_BS
        if paper:
            when_kept_BS = when_kept_BS.masked_fill(back_BS, torch.nan)

        new_BS = torch.where(kept_BS, token_BS, chain.z_BS)
        t = float((masked_BS & ~kept_BS | back_BS).sum()) / num_free
        chain.advance(torch.where(back_BS, chain.mask_id, new_BS), t, active_B)
