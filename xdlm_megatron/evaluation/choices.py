"""Multiple choice by conditional likelihood, from local JSON lines: {"prompt", "choices", "answer"}.

Shape suffixes: C choices of a question, D draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.tokenizer import Tokenizer
from xdlm_megatron.evaluation.likelihood import Request, make_request
from xdlm_megatron.evaluation.nelbo import standard_error
from xdlm_megatron.evaluation.records import Estimate

FORM = (
    'a line must be {"prompt": text, "choices": [text, text, ...], "answer": number of the right one from 0}'
)


@dataclass(frozen=True)
class Question:
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answer:
    """What the model makes of a question. nats: the bound on -log p of each choice.

    undecided: the best two differ by less than two standard errors of their difference, over draws.
    """

    nats: tuple[Estimate, ...]
    chosen: int
    chosen_per_byte: int
    undecided: bool


@dataclass(frozen=True)
class ChoiceResult:
    """Shares of questions, with standard errors over questions.

    accuracy: the likeliest choice is the right one; accuracy_per_byte: so is the one with the fewest nats a
    byte. undecided: more draws might change the choice.
    """

    accuracy: Estimate
    accuracy_per_byte: Estimate
    undecided: float
    answers: list[Answer]


def read_questions(path: Path) -> list[Question]:
    """Raises DataError with file and line where one is not of the form."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append(_question(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: {FORM} ({error})") from None
    if not found:
        raise DataError(f"{path} has no questions; {FORM}")
    return found


def _question(record: Any) -> Question:
    prompt, choices, answer = record["prompt"], record["choices"], record["answer"]
    texts = isinstance(prompt, str) and isinstance(choices, list) and all(isinstance(c, str) for c in choices)
    if not texts or type(answer) is not int:
        raise ValueError("another type")
    if len(choices) < 2 or not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} of {len(choices)} choices")
    return Question(prompt, tuple(choices), answer)


def make_requests(
    tokenizer: Tokenizer, questions: Sequence[Question], seq_length: int
) -> tuple[list[Request], int]:
    """A request for each choice, those of a question in one group; and how many prompts were too long."""
    made = [
        make_request(tokenizer, question.prompt, choice, group, seq_length)
        for group, question in enumerate(questions)
        for choice in question.choices
    ]
    return [request for request, _ in made], sum(cut for _, cut in made)


def judge(questions: Sequence[Question], nats_RD: Tensor) -> ChoiceResult:
    """nats_RD: of the requests of make_requests, in its order."""
    per_question = nats_RD.cpu().split([len(question.choices) for question in questions])
    answers = [_answer(question, nats_CD) for question, nats_CD in zip(questions, per_question, strict=True)]
    right = [question.answer for question in questions]
    return ChoiceResult(
        _share([each.chosen == r for each, r in zip(answers, right, strict=True)]),
        _share([each.chosen_per_byte == r for each, r in zip(answers, right, strict=True)]),
        sum(each.undecided for each in answers) / len(answers),
        answers,
    )


def _answer(question: Question, nats_CD: Tensor) -> Answer:
    nats_C = nats_CD.mean(dim=1)
    best, second = nats_C.topk(2, largest=False).indices.tolist()
    gap_D = nats_CD[second] - nats_CD[best]
    bytes_C = torch.tensor([len(choice.encode()) for choice in question.choices])
    return Answer(
        tuple(
            Estimate(mean, standard_error(row_D))
            for mean, row_D in zip(nats_C.tolist(), nats_CD, strict=True)
        ),
        best,
        int((nats_C / bytes_C).argmin()),
        not gap_D.mean().item() >= 2 * standard_error(gap_D),  # unknown where there is one draw
    )


def _share(outcomes: list[bool]) -> Estimate:
    n, p = len(outcomes), sum(outcomes) / len(outcomes)
    return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan)
