"""Conditional likelihoods against enumeration, and what sharing the noise is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.evaluation.toy import Toy
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.tokenizer import load_tokenizer
from xdlm_megatron.evaluation.choices import Question, judge, read_questions
from xdlm_megatron.evaluation.likelihood import LikelihoodEvaluator, Request, make_request
from xdlm_megatron.evaluation.nelbo import standard_error
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh

T_MIN = 0.2  # which keeps weights, and with them the spread, small
LARGE = {"micro_batch_size": 16_000, "global_batch_size": 16_000}  # of samples of two tokens, padded to 32


def evaluator(toy: Toy, mesh: Mesh, num_draws: int) -> LikelihoodEvaluator:
    return LikelihoodEvaluator(toy.config, mesh, Objective(toy.noise, mesh), num_draws)


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_agrees_with_enumeration(k: float, mesh: Mesh) -> None:
    """Every prompt and every target; padding to 32 positions changes nothing. So does the marginal bound."""
    toy = Toy(mesh, k, t_min=T_MIN, train=LARGE)
    requests = [Request((a,), (b,), group=a) for a in (0, 2) for b in range(3)]
    requests.append(Request((), (0, 2), group=9))
    nats_RD = evaluator(toy, mesh, 400)(toy.chunks, requests)
    for request, nats_D in zip(requests, nats_RD, strict=True):
        free = tuple(i >= len(request.prompt) for i in range(2))
        exact = toy.bound((*request.prompt, *request.target), free).item()
        error = standard_error(nats_D)
        assert error < 0.45
        assert nats_D.mean().item() == pytest.approx(exact, abs=3 * error)


def test_choices_share_their_noise(mesh: Mesh) -> None:
    """Same group: the same targets have the same nats, and differences vary less than between groups."""
    toy = Toy(mesh, 0.0, t_min=T_MIN, train=LARGE)
    middle, other = sorted(range(3), key=lambda b: toy.bound((0, b), (False, True)))[1:]
    groups = {7: (middle, other, middle), 8: (middle,)}
    requests = [Request((0,), (b,), group) for group, targets in groups.items() for b in targets]
    nats_RD = evaluator(toy, mesh, 400)(toy.chunks, requests)
    assert torch.equal(nats_RD[0], nats_RD[2])
    assert not torch.equal(nats_RD[0], nats_RD[3])
    paired, unpaired = (standard_error(nats_RD[1] - nats_RD[first]) for first in (0, 3))
    assert paired < 0.7 * unpaired


def test_judging() -> None:
    """Nats by hand: lengths turn the second question around, the third is too close to call."""
    questions = [
        Question("", ("no", "yes"), 1),
        Question("", ("a", "a long answer"), 1),
        Question("", ("x", "y", "z"), 2),
    ]
    wobble = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    means = torch.tensor([9.0, 3, 4, 6, 5, 5.1, 8], dtype=torch.float64)
    nats_RD = means[:, None] + wobble * torch.tensor([1.0, 1, 1, 1, 1, -1, 1])[:, None]
    result = judge(questions, nats_RD)
    assert [answer.chosen for answer in result.answers] == [1, 0, 0]
    assert [answer.chosen_per_byte for answer in result.answers] == [1, 1, 0]
    assert [answer.undecided for answer in result.answers] == [False, False, True]
    assert result.accuracy == (pytest.approx(1 / 3), pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5))
    assert result.accuracy_per_byte.mean == pytest.approx(2 / 3)
    assert result.undecided == pytest.approx(1 / 3)
    assert result.answers[0].nats[0].mean == 9


def test_a_target_begins_where_the_ids_part(tiny_data: dict) -> None:
    tokenizer = load_tokenizer(str(tiny_data["tokenizer"]))
    request, cut = make_request(tokenizer, "To be, or not", " to be", 4, 32)
    assert (request.group, cut) == (4, False)
    assert list(request.prompt) == tokenizer.encode("To be, or not")
    assert [*request.prompt, *request.target] == tokenizer.encode("To be, or not to be")
    short, cut = make_request(tokenizer, "To be, or not", " to be", 0, len(request.target) + 2)
    assert (short.prompt, short.target, cut) == (request.prompt[-2:], request.target, True)
    with pytest.raises(DataError, match=r"tokens and data\.seq_length is 3"):
        make_request(tokenizer, "To be", ", or not to be: that is the question", 0, 3)
    with pytest.raises(DataError, match="has no tokens"):
        make_request(tokenizer, "To be", "", 0, 32)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "choices": ["b"], "answer": 0},
        {"prompt": "a", "choices": ["b", "c"], "answer": 2},
        {"prompt": "a", "choices": ["b", "c"], "answer": True},
        {"prompt": "a", "choices": "bc", "answer": 0},
        {"choices": ["b", "c"], "answer": 0},
        ["a"],
    ],
)
def test_questions_of_another_form_are_refused(record: object, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    good = {"prompt": "a", "choices": ["b", "c"], "answer": 1}
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(record)}\n")
    with pytest.raises(DataError, match=r"q\.jsonl:3: a line must be"):
        read_questions(path)
    path.write_text(json.dumps(good))
    assert read_questions(path) == [Question("a", ("b", "c"), 1)]
