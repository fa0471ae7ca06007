"""SDPAttention against softmax(Q K^T) V written out."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.model.small import small_config
from xdlm_megatron.model.attention import SDPAttention
from xdlm_megatron.model.build import build_model
from xdlm_megatron.model.transformer_config import build_transformer_config
from xdlm_megatron.parallel.mesh import Mesh, seed_model_parallel_rng

S, B, N, D = 7, 3, 6, 4


def attention(**model: object) -> SDPAttention:
    config = small_config(model=model)
    transformer = build_transformer_config(config.model, config.parallel, config.precision)
    return SDPAttention(transformer, 1, None, "self")


def random_qkv(num_groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(S, B, heads, D, generator=generator, dtype=torch.float64)

    return draw(N), draw(num_groups), draw(num_groups)


def written_out(query, key, value) -> torch.Tensor:
    """One position, sequence and head at a time; query head n uses key/value head n // (N / G)."""
    per_group = N // key.shape[2]
    out = torch.empty(S, B, N * D, dtype=torch.float64)
    for s in range(S):
        for b in range(B):
            for n in range(N):
                g = n // per_group
                scores = torch.stack([query[s, b, n] @ key[other, b, g] for other in range(S)]) / D**0.5
                weights = scores.exp() / scores.exp().sum()
                out[s, b, n * D : (n + 1) * D] = sum(
                    weights[other] * value[other, b, g] for other in range(S)
                )
    return out


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_equals_the_softmax_written_out(num_groups: int) -> None:
    qkv = random_qkv(num_groups)
    torch.testing.assert_close(attention()(*qkv), written_out(*qkv), rtol=1e-12, atol=1e-12)


def test_a_later_token_changes_every_earlier_output() -> None:
    query, key, value = random_qkv(2)
    before = attention()(query, key, value)
    value[-1] += 1.0
    assert (attention()(query, key, value) != before).all()


def test_a_mask_hides_keys_as_if_they_were_not_there() -> None:
    """Positions 0-2 and 3-6 each for themselves; the second sequence sees all but its last position."""
    qkv = random_qkv(2)
    hidden = torch.zeros(B, 1, S, S, dtype=torch.bool)
    hidden[0, 0, :3, 3:] = hidden[0, 0, 3:, :3] = True
    hidden[1, 0, :, -1] = True
    out = attention()(*qkv, attention_mask=hidden)
    for part in (slice(0, 3), slice(3, S)):
        alone = attention()(*(x[part] for x in qkv))
        torch.testing.assert_close(out[part, 0], alone[:, 0], rtol=1e-12, atol=1e-12)
    query, key, value = qkv
    shorter = attention()(query, key[:-1], value[:-1])
    torch.testing.assert_close(out[:, 1], shorter[:, 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[:, 2], attention()(*qkv)[:, 2], rtol=1e-12, atol=1e-12)


def test_dropout_draws_from_the_model_parallel_stream_alone(mesh: Mesh) -> None:
    module, qkv = attention(attention_dropout=0.5), random_qkv(2)

    def run(seed: int) -> torch.Tensor:
        seed_model_parallel_rng(seed)
        before = torch.get_rng_state()
        out = module(*qkv)
        assert torch.equal(torch.get_rng_state(), before), "it moved the generator that all ranks share"
        return out

    first = run(1)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    assert not torch.equal(module(*qkv), run(2)), "a second call must draw anew"
    module.eval()
    torch.testing.assert_close(module(*qkv), written_out(*qkv), rtol=1e-12, atol=1e-12)


def test_dropout_is_unbiased(mesh: Mesh) -> None:
    module, qkv = attention(attention_dropout=0.3), random_qkv(2)
    seed_model_parallel_rng(1)
    mean = torch.stack([module(*qkv) for _ in range(4000)]).mean(dim=0)
    assert (mean - written_out(*qkv)).abs().max() < 0.1


class Shapes(TorchDispatchMode):
    """Collects the shape of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen += [x.shape for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


@pytest.mark.parametrize("documents", [False, True])
def test_no_scores_are_kept_or_made(documents: bool, mesh: Mesh) -> None:
    """Nothing in a step has S x S elements a head: neither saved for backward nor returned by an operator.

    With documents there is one mask for all heads and layers.
    """
    length = 100
    document_BT = (torch.arange(length).view(1, length) // 30).int() if documents else None
    config = small_config(data={"seq_length": length})
    (model,) = build_model(config, mesh)
    saved: list[torch.Size] = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    tokens = torch.arange(length).view(1, length) % 44
    with Shapes() as operators, torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model(tokens, document_BT).square().sum().backward()
    assert len(saved) > 20
    assert len(operators.seen) > 100
    one_mask = {(1, length, length), (1, 1, length, length)} if documents else set()
    shapes = [shape for shape in saved + operators.seen if tuple(shape) not in one_mask]
    largest = max(shape.numel() for shape in shapes)
    assert largest == length * 2 * config.model.ffn_hidden_size, "the SwiGLU input is the largest tensor"
    assert largest < 4 * length * length
    for shape in shapes:
        assert shape[-2:] != (length, length), shape
