"""Sampling: what a prompt, a seed and the number of samples may and may not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.unit.model.small import small_config
from xdlm_megatron.config.samplers import AncestralSampler, ConfidenceSampler, Sampler
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.evaluation import generation
from xdlm_megatron.evaluation.generation import (
    SampleOptions,
    Samples,
    build_denoiser,
    generate,
    observe,
)
from xdlm_megatron.model.build import build_model
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.samplers import SAMPLERS, sample

V, MASK, S = 20, 19, 15
PROMPT = [3, 1, 4, 1]


class Neighbours:
    """Logits of a position from its own token and the one on its left; counts its calls."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.own, self.left = (torch.randn(V, V, generator=generator) * 0.7 for _ in range(2))
        self.calls = 0
        self.seen: list[Tensor] = []

    def __call__(self, zt_BS: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(zt_BS.clone())
        return self.own[zt_BS] + self.left[zt_BS.roll(1, dims=1)]


def run(
    denoise: Callable[[Tensor], Tensor],
    prompt: list[int] = PROMPT,
    ratio: float = 0.3,
    suffix: list[int] | None = None,
    **options: Any,
) -> Samples:
    what = {name: options.pop(name) for name in ("num_samples", "seed") if name in options}
    chosen = SampleOptions(**{"num_samples": 3, **what})
    settings = AncestralSampler(**{"num_steps": 8, **options})
    observed = observe(S, prompt, suffix or [], torch.device("cpu"))
    return generate(denoise, chosen, settings, StationaryNoise(ratio, V, MASK), LogLinear(), observed)


@pytest.mark.parametrize("final", ["ancestral", "greedy", "none"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_prompt_never_changes(final: str, ratio: float) -> None:
    denoise = Neighbours()
    samples = run(denoise, ratio=ratio, final=final)
    assert samples.ids.shape == (3, S)
    for ids in [samples.ids, *denoise.seen, *(ids[None] for _, ids in samples.snapshots)]:
        assert (ids[:, : len(PROMPT)] == torch.tensor(PROMPT)).all()
    free = samples.ids[:, len(PROMPT) :]
    assert len(free.unique()) > 5
    if final != "none":
        assert (free != MASK).all()


@pytest.mark.parametrize(("final", "extra"), [("ancestral", 1), ("greedy", 1), ("none", 0)])
def test_function_evaluations_are_counted(final: str, extra: int) -> None:
    denoise = Neighbours()
    samples = run(denoise, final=final)
    assert int(samples.evaluations.max()) <= denoise.calls <= 8 + extra
    assert samples.steps.tolist() == [8 + extra] * 3
    times = [t for t, _ in samples.snapshots]
    assert len(times) == 8 + extra + 1
    assert times[0] == 1.0
    assert times == sorted(times, reverse=True)
    assert torch.equal(samples.snapshots[0][1], denoise.seen[0][0])
    assert torch.equal(samples.snapshots[-1][1], samples.ids[0])


def test_the_seed_decides() -> None:
    first = run(Neighbours(), seed=5).ids
    torch.manual_seed(123)  # no generator matters
    assert torch.equal(run(Neighbours(), seed=5).ids, first)
    other = run(Neighbours(), seed=6).ids
    assert (other[:, len(PROMPT) :] != first[:, len(PROMPT) :]).float().mean() > 0.3


def test_a_sample_does_not_depend_on_the_others() -> None:
    one, three = run(Neighbours(), num_samples=1).ids, run(Neighbours(), num_samples=3).ids
    assert torch.equal(one[0], three[0])
    assert not torch.equal(three[1], three[0])


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        ({"num_samples": 0}, [], "--num-samples 0 must be >= 1"),
        ({}, [1] * S, f"prompt and suffix have {S} tokens and data.seq_length is {S}; shorten them"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Neighbours(), prompt, **options)


def test_defaults_are_free_of_surprises() -> None:
    """The law itself: neither temperature nor nucleus, and the noise removed at the end."""
    settings = AncestralSampler()
    assert (settings.temperature, settings.top_p, settings.final) == (1.0, 1.0, "ancestral")
    assert (settings.guidance_scale, settings.block_size) == (0.0, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_chosen_rows_meet_the_head(dtype: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their logits are the model's, without dropout; they come in chunks and the ids go to their places."""
    config = small_config(model={"zero_init_head": False, "hidden_dropout": 0.5}, precision={"dtype": dtype})
    chunks = build_model(config, mesh)
    monkeypatch.setitem(generation.CHUNK_ELEMENTS, "cpu", 5 * 48)
    zt_BS = torch.arange(36).view(3, 12)
    prediction = build_denoiser(chunks, mesh)(zt_BS)
    assert not chunks[0].training
    with torch.no_grad():
        expected = chunks[0](zt_BS).transpose(0, 1).reshape(36, 48)
    asked = []

    def pick(at_M: Tensor, logits_NP: Tensor, index_M: Tensor, group: object) -> Tensor:
        assert group is None
        assert len(logits_NP) <= 5
        torch.testing.assert_close(logits_NP[index_M], expected[at_M], rtol=1e-5, atol=1e-6)
        asked.append(at_M)
        return at_M + 1000

    chosen_BS = zt_BS % 3 == 1
    ids_BS = prediction.replace(zt_BS, chosen_BS, pick)
    assert torch.cat(asked).tolist() == list(range(1, 36, 3))
    assert torch.equal(ids_BS, torch.where(chosen_BS, zt_BS + 1000, zt_BS))
    assert torch.equal(zt_BS, torch.arange(36).view(3, 12))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of a storage that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_no_sampler_makes_logits_of_all_positions(
    kind: str, top_p: float, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[B, L, V] has 262144 elements. The largest tensor is the head's weight, a quarter of that."""
    B, L, vocab, H = 2, 32, 4096, 16
    config = small_config(
        model={"hidden_size": H, "num_attention_heads": 2, "zero_init_head": False},
        data={"seq_length": L, "vocab_size": vocab, "mask_id": vocab - 1},
    )
    monkeypatch.setitem(generation.CHUNK_ELEMENTS, "cpu", 4 * vocab)
    denoise = build_denoiser(build_model(config, mesh), mesh)
    few = {"saber": {"min_tokens": 16}, "left_to_right": {}}.get(kind, {"num_steps": 2})
    settings = TypeAdapter(Sampler).validate_python({"kind": kind, "top_p": top_p, **few})
    rows = (StationaryNoise(0.3, vocab, vocab - 1), LogLinear(), 1, torch.full((B, L), -1))
    with LargestTensor() as seen:
        sample(denoise, settings, *rows)
    assert seen.elements == H * vocab < B * L * vocab / 3


def test_hidden_states_give_the_ids_of_logits(mesh: Mesh) -> None:
    """The whole loop with the model's head left out, against the same model as a plain function."""
    config = small_config(model={"zero_init_head": False})
    chunks = build_model(config, mesh)

    def logits(zt_BS: Tensor) -> Tensor:
        with torch.no_grad():
            return chunks[0](zt_BS).transpose(0, 1)

    for settings in (
        AncestralSampler(num_steps=6),
        AncestralSampler(num_steps=6, final="greedy"),
        AncestralSampler(num_steps=6, top_p=0.8, temperature=0.7),
        AncestralSampler(num_steps=6, guidance_scale=1.5),
        ConfidenceSampler(kind="confidence", num_steps=6),
    ):
        both = [
            generate(
                denoise,
                SampleOptions(num_samples=2),
                settings,
                StationaryNoise(0.3, config.data.vocab_size, config.data.mask_id),
                LogLinear(),
                observe(12, [3], [], torch.device("cpu")),
            )
            for denoise in (build_denoiser(chunks, mesh), logits)
        ]
        assert torch.equal(both[0].ids, both[1].ids)
        assert torch.equal(both[0].evaluations, both[1].evaluations)
