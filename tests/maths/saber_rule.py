"""Saber's step for one sequence, in plain Python from its published rule (arXiv 2510.18165, section 4) and
its released code: no tensors, no batch. `kept` below is the set D_t of the paper.
"""

from dataclasses import dataclass, field


@dataclass
class Memory:
    when_kept: dict[int, float] = field(default_factory=dict)
    before: dict[int, float] = field(default_factory=dict)


def saber_step(variant, ids, mask_id, free, tokens, sure, own, memory, n, mu):
    """(ids, memory) after a step.

    free: positions to fill. tokens[i], sure[i]: the token that the network would put at i, and its
    probability; own[i]: the probability of the token that is there.
    """
    masked = [i for i in free if ids[i] == mask_id]
    visible = [i for i in free if ids[i] != mask_id]
    remembered = memory.when_kept.values()
    threshold = sum(remembered) / len(remembered) if remembered else 1.0
    kept = [i for i in masked if sure[i] > threshold]
    if len(kept) < n:
        kept = sorted(masked, key=lambda i: -sure[i])[:n]
    ids, when_kept = list(ids), dict(memory.when_kept)
    for i in kept:
        ids[i] = tokens[i]
        when_kept[i] = sure[i]
    if variant == "release":
        now = {i: sure[i] for i in free}
        drop = {i: memory.before.get(i, 0.0) - now[i] for i in [*visible, *kept]}
        budget = max(n // 2, (len(kept) + mu - 1) // mu)
    else:
        now = {i: own[i] if i in visible else sure[i] for i in free}
        drop = {i: memory.before[i] - now[i] for i in visible}
        budget = max(1, len(kept) // mu)
    if len(kept) < len(masked):
        for i in sorted(drop, key=lambda i: -drop[i])[: min(budget, len(kept) - 1)]:
            ids[i] = mask_id
            if variant == "paper":
                del when_kept[i]
    return tuple(ids), Memory(when_kept, now)
