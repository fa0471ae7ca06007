"""Continuations: what greedy decoding gives, by hand on a network of 16 states; stops, lengths, calls."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.unit.evaluation.toy import MASK, Toy
from xdlm_megatron.evaluation.completions import Completer, Prompt, make_prompt
from xdlm_megatron.evaluation.likelihood import Request
from xdlm_megatron.parallel.mesh import Mesh


class Letters:
    """Id i is the i-th letter; c ends a document."""

    eod_id = 2

    def encode(self, text: str) -> list[int]:
        return ["abc".index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join("abc"[i] for i in ids)


def completer(toy: Toy, mesh: Mesh, seed: int = 1) -> Completer:
    tokenizer: Any = Letters()
    return Completer(toy.config, mesh, toy.chunks, tokenizer, seed)


def greedily(toy: Toy, state: tuple[int, ...]) -> tuple[int, ...]:
    """The likeliest token at the surest mask, until there is none."""
    while MASK in state:
        logits_SV = toy.chunks[0](torch.tensor([state]))[:, 0, :MASK]
        p_SV = logits_SV.softmax(-1) * (torch.tensor(state) == MASK)[:, None]
        place = int(p_SV.max(1).values.argmax())
        state = (*state[:place], int(p_SV[place].argmax()), *state[place + 1 :])
    return state


@pytest.mark.parametrize("k", [0.0, 0.3])
def test_greedy_decoding_by_hand(k: float, mesh: Mesh) -> None:
    """Every prompt and target of one token and of two; padding to 32 is not seen."""
    toy = Toy(mesh, k)
    targets = [*product(range(3)), *product(range(3), repeat=2)]
    requests = [Request((a,), target, 0) for a in range(3) for target in targets]
    found = completer(toy, mesh).reproduces(requests)
    wanted = [
        greedily(toy, (*request.prompt, *[MASK] * len(request.target))) == (*request.prompt, *request.target)
        for request in requests
    ]
    assert found == wanted
    assert sum(found) == 6  # one for each prompt and length
    assert len({request.target[-1] for request, same in zip(requests, found, strict=True) if same}) > 1


@pytest.mark.parametrize("seed", range(1, 7))
def test_an_autoregressive_model_decodes_from_left_to_right(seed: int, mesh: Mesh) -> None:
    """Each next token the likeliest after those before it, the surest of all positions or not."""
    sections = {
        "run": {"seed": seed},
        "model": {"autoregressive": True},
        "sampling": {"kind": "left_to_right"},
    }
    toy = Toy(mesh, 0.0, **sections)
    requests = [Request((), target, 0) for target in product(range(3), repeat=2)]
    first = int(toy.chunks[0](torch.tensor([[0, 0]]))[0, 0, :MASK].argmax())
    second = int(toy.chunks[0](torch.tensor([[first, 0]]))[1, 0, :MASK].argmax())
    found = completer(toy, mesh).reproduces(requests)
    assert [request.target for request, same in zip(requests, found, strict=True) if same] == [
        (first, second)
    ]


def test_no_masks_no_greedy_decoding(mesh: Mesh) -> None:
    assert completer(Toy(mesh, 1.0), mesh).reproduces([Request((0,), (1,), 0)]) == [False]


def test_completions_end_at_their_stops(mesh: Mesh) -> None:
    """Of prompts of two lengths, in their order; texts without the document's end, calls as counted."""
    toy = Toy(mesh, 0.0, sampling={"kind": "ancestral", "num_steps": 6, "temperature": 2.0})
    prompts = [Prompt((0,) * (1 + 40 * (n % 2)), 6, ("b",) if n % 3 else ()) for n in range(24)]
    found = completer(toy, mesh)(prompts)
    texts = [completion.text for completion in found]
    assert {completion.network_calls for completion in found} <= set(range(3, 8))
    assert all("c" not in text and len(text) <= 6 for text in texts)
    assert not any("b" in text for text in texts[1::3] + texts[2::3])
    assert any("b" in text for text in texts[::3])
    assert len(set(texts)) > 4
    again = completer(toy, mesh)(prompts)
    assert again == found
    assert completer(toy, mesh, seed=2)(prompts) != found
    assert torch.is_grad_enabled()


def test_long_contexts_lose_their_beginning() -> None:
    tokenizer: Any = Letters()
    assert make_prompt(tokenizer, "abba", 3, (), 8) == (Prompt((0, 1, 1, 0), 3, ()), False)
    assert make_prompt(tokenizer, "abbaab", 3, ["b"], 8) == (Prompt((1, 1, 0, 0, 1), 3, ("b",)), True)
    assert make_prompt(tokenizer, "ab", 99, (), 8) == (Prompt((1,), 7, ()), True)
