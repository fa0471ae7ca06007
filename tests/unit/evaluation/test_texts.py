"""Text files as held-out sets: every token in a row once, and bytes of the same text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.unit.model.small import small_config
from xdlm_megatron.data.packing import PADDING
from xdlm_megatron.data.tokenizer import load_tokenizer
from xdlm_megatron.evaluation.nelbo import NelboEvaluator
from xdlm_megatron.evaluation.texts import TextRows, TextSet, build_text_samples
from xdlm_megatron.model.build import build_model
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh

DOCUMENTS = [[11, 12, 13], [21], [31, 32, 33, 34, 35, 36]]


@pytest.mark.parametrize(
    ("packing", "ids", "numbers"),
    [
        ("stream", [[11, 12, 13, 21], [31, 32, 33, 34], [35, 36, 0, 0]], ["0000", "0000", "00--"]),
        ("documents", [[11, 12, 13, 21], [31, 32, 33, 34], [35, 36, 0, 0]], ["0001", "0000", "00--"]),
        (
            "padded",
            [[11, 12, 13, 0], [21, 0, 0, 0], [31, 32, 33, 34], [35, 36, 0, 0]],
            ["000-", "0---", "0000", "00--"],
        ),
    ],
)
def test_rows(packing: str, ids: list, numbers: list[str]) -> None:
    rows = TextRows(DOCUMENTS, 4, packing)
    assert [rows[i].tolist() for i in range(len(rows))] == ids
    glyphs = [["-" if n == PADDING else str(n) for n in rows.documents(i)] for i in range(len(rows))]
    assert ["".join(row) for row in glyphs] == numbers
    assert not any(rows.prompts(i).any() for i in range(len(rows)))
    assert rows.num_tokens == 10


@pytest.mark.parametrize("packing", ["stream", "padded"])
def test_bits_per_byte_are_of_the_text_that_is_scored(
    packing: str, tiny_recipe: dict, tmp_path: Path, mesh: Mesh
) -> None:
    """All tokens of all texts, ends of documents among them; bytes of the detokenized text."""
    recipe = {**tiny_recipe, "data": {**tiny_recipe["data"], "packing": packing}}
    config = small_config(recipe, evaluation={"num_sequences": 1000})
    path = tmp_path / "a.jsonl"
    texts = ["to be , or not to be ! ", "that is — the question ? "]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    read = TextSet(path, "wikitext").read()
    assert read == ["to be, or not to be! ", "that is — the question? "]
    tokenizer = load_tokenizer(config.data.tokenizer)
    samples, bytes_per_token = build_text_samples(config, tokenizer, read, mesh.device, slice(None))
    evaluator = NelboEvaluator(config, mesh, samples, Objective(samples.noise, mesh), bytes_per_token)
    result = evaluator(build_model(config, mesh))
    num_tokens = sum(len(tokenizer.encode(text)) + 1 for text in read)
    assert result.num_tokens == num_tokens
    num_bytes = sum(len(text.encode()) for text in read)
    assert num_bytes > sum(map(len, read))
    bits = result.nelbo_per_token * num_tokens / math.log(2) / num_bytes
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-12)
    clean = samples.clean(np.arange(len(samples.dataset)))
    scored = clean.x0_BS[clean.scored_BS].tolist()
    assert sorted(scored) == sorted(i for text in read for i in [*tokenizer.encode(text), tokenizer.eod_id])
