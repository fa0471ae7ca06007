"""Generative perplexity can be cheated with a loop; what stands beside it tells."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.evaluation.tiny_scorer import write_scorer
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.evaluation.mauve import check_mauve, compare_features, mauve_of
from xdlm_megatron.evaluation.quality import diversity, low_entropy_share
from xdlm_megatron.evaluation.scorer import CausalScorer, Scored
from xdlm_megatron.evaluation.scoring import Texts, as_table, read_samples, score_samples, to_record

V, LENGTH = 40, 64


class Bigrams:
    """A language model in closed form: each token is followed by its successor, else by any other."""

    name, fingerprint = "bigrams", "0"

    def __call__(self, text: str) -> Scored:
        ids = [ord(c) - 33 for c in text]
        follows = sum((b - a) % V == 1 for a, b in pairwise(ids))
        nats = math.log(V) - follows * math.log(0.3) - (len(ids) - 1 - follows) * math.log(0.7 / (V - 1))
        return Scored(nats, len(ids), len(text.encode()))


def sample_bigrams(number: int, seed: int) -> Texts:
    """Drawn from that model itself."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        ids = [int(rng.integers(V))]
        while len(ids) < LENGTH:
            step = 1 if rng.random() < 0.3 else int(rng.integers(2, V + 1))
            ids.append((ids[-1] + step) % V)
        rows.append(np.array(ids))
    return as_texts(rows)


def as_texts(rows: list[np.ndarray]) -> Texts:
    texts = ["".join(chr(33 + i) for i in row) for row in rows]
    return Texts(rows, texts, (9,) * len(rows), (8,) * len(rows), {"seed": 5, "checkpoint_hash": "f"})


def test_a_looped_phrase_is_flagged_although_its_perplexity_is_low() -> None:
    reference, honest = sample_bigrams(100, seed=1), sample_bigrams(50, seed=2)
    loops = as_texts([np.tile(np.arange(start, start + 4) % V, LENGTH // 4) for start in range(50)])
    good, bad = (score_samples(samples, reference, Bigrams()) for samples in (honest, loops))
    assert good.reference is not None
    assert bad.samples.scores.perplexity < 0.5 * good.samples.scores.perplexity
    assert good.samples.scores.perplexity == pytest.approx(good.reference.scores.perplexity, rel=0.05)
    assert bad.samples.diversity.unigram_entropy.mean == pytest.approx(math.log(4))
    assert bad.samples.diversity.repeated_4 > 0.9 > 0.05 > good.samples.diversity.repeated_4
    assert (bad.samples.low_entropy, good.samples.low_entropy) == (1.0, pytest.approx(0.01, abs=0.03))
    assert "100% of the samples have less entropy" in bad.warnings[0]
    assert not good.warnings
    assert all(head in as_table(bad) for head in ("gen ppl", "bits/byte", "entropy", "rep-4", "calls"))
    record = json.loads(json.dumps(to_record(loops, Bigrams(), bad)))
    assert record["made_by"] == {"seed": 5, "checkpoint_hash": "f"}
    assert (record["samples"]["network_calls"], record["scorer"]["name"]) == (9, "bigrams")
    assert record["samples"]["scores"]["perplexity"] == bad.samples.scores.perplexity


def test_figures_by_hand() -> None:
    """Nats over tokens and over bytes; n-grams counted over all samples, repetitions within each."""
    found = diversity([np.array([1, 2, 3, 1, 2, 3, 1, 2]), np.array([4, 4, 4, 4, 4, 4, 4, 4])])
    assert found.distinct_1 == 4 / 16
    assert found.distinct_2 == 4 / 14
    assert found.distinct_3 == 4 / 12
    assert found.repeated_4 == pytest.approx((2 / 5 + 4 / 5) / 2)
    scores = score_samples(as_texts([np.arange(8), np.arange(0, 16, 2)]), None, Bigrams())
    first, second = (math.log(V) - 7 * math.log(p) for p in (0.3, 0.7 / (V - 1)))
    assert scores.samples.scores.nats_per_token.mean == pytest.approx((first + second) / 16)
    assert scores.samples.scores.nats_per_token.standard_error == pytest.approx((second - first) / 16)
    assert scores.samples.scores.bits_per_byte == pytest.approx((first + second) / 16 / math.log(2))
    assert "no held-out text" in scores.warnings[0]
    with pytest.raises(ValueError, match="at least 4 tokens"):
        diversity([np.array([1, 2, 3])])


def test_honest_samples_are_rarely_low() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(V, size=LENGTH) for _ in range(1200)]
    assert low_entropy_share(rows[:800], rows[800:]) < 0.03


def test_a_file_that_holds_no_samples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("", "[]", "{}", '{"samples": [{"text": "a"}]}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"a\.json is no file of samples"):
            read_samples(path)
    with pytest.raises(DataError, match="no such folder"):
        CausalScorer(tmp_path / "nothing")


def test_mauve_tells_equal_features_from_others() -> None:
    """The real package. 1 for one set of features twice, high for two draws of a law, low for another law."""
    pytest.importorskip("mauve")
    draw = np.random.default_rng(0).normal
    one, other, far = draw(size=(120, 4)), draw(size=(120, 4)), draw(size=(120, 4)) + 9 * np.eye(4)[0]
    same, near, apart = (compare_features(one, each) for each in (one, other, far))
    assert same.score == pytest.approx(1, abs=1e-3)
    assert same.score > near.score > 0.7 > 0.05 > apart.score
    assert (near.num_texts, near.num_buckets) == ((120, 120), 12)


def test_mauve_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="add --scorer"):
        check_mauve(None)
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(DataError, match=r"pip install 'xdlm_megatron\[mauve\]'"):
        check_mauve(tmp_path)
    with pytest.raises(DataError, match=r"no data\.valid_prefix"):
        mauve_of(object(), ["a"], None)


def test_a_causal_model_from_a_folder(tmp_path: Path) -> None:
    """Against the model's own loss; a text beyond the context is scored in pieces, to its end."""
    network = write_scorer(tmp_path)
    scorer = CausalScorer(tmp_path)
    short, long = scorer("to be or not"), scorer("to be or not " * 5)
    ids = torch.tensor([[0, 1, 2, 3, 4]])
    loss = network.eval()(input_ids=ids, labels=ids).loss.item()
    assert (short.num_tokens, short.num_bytes) == (4, 12)
    assert short.nats == pytest.approx(4 * loss, rel=1e-5)
    assert abs(loss - math.log(6)) > 0.1
    assert long.num_tokens == 20
    pieces = [
        scorer(text).nats
        for text in ("to be or not to be or not", "to be or not to be or not", "to be or not")
    ]
    assert long.nats == pytest.approx(sum(pieces), rel=1e-5)
    assert "model.safetensors:" in scorer.fingerprint
    hidden = network.transformer(input_ids=ids).last_hidden_state[0, -1]
    assert scorer.features("to be or not") == pytest.approx(hidden.tolist(), rel=1e-5, abs=1e-6)
    assert (scorer.features("to be or not " * 5) == scorer.features("to be or not " * 2)).all()
    if importlib.util.find_spec("mauve"):
        texts, others = ["to be", "or", "not to"] * 8, ["be", "or not", "to or"] * 8
        found = compare_features(*(np.stack([scorer.features(t) for t in each]) for each in (texts, others)))
        assert mauve_of(scorer, texts, others) == found
        assert found.score < 1
