import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.indexed import load_manifest, open_indexed
from xdlm_megatron.data.preprocess import PreprocessOptions, preprocess
from xdlm_megatron.data.tokenizer import load_tokenizer


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def options(tmp_path: Path, texts: list[str], sp_path: Path) -> PreprocessOptions:
    source = write_lines(tmp_path / "in.jsonl", texts)
    return PreprocessOptions(inputs=(str(source),), output=str(tmp_path / "out/data"), tokenizer=str(sp_path))


def made(options: PreprocessOptions, **changes: Any) -> Path:
    """Runs with changes; returns the prefix."""
    changed = dataclasses.replace(options, **changes)
    preprocess(changed)
    return Path(changed.output)


def documents(prefix: Path | str) -> list[list[int]]:
    dataset = open_indexed(prefix)
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[n].tolist() for n in range(len(dataset))]


def test_every_document_in_order_with_its_end(options: PreprocessOptions, texts: list[str]) -> None:
    prefix = made(options)
    tokenizer = load_tokenizer(options.tokenizer)
    assert documents(prefix) == [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    manifest = load_manifest(prefix)
    assert manifest.documents == len(texts)
    assert manifest.tokens == sum(len(d) for d in documents(prefix))
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.bytes_per_token == pytest.approx(manifest.text_bytes / manifest.tokens, abs=1e-4)
    assert (manifest.vocab_size, manifest.mask_id, manifest.eod_id, manifest.dtype) == (512, 2, 1, "uint16")
    assert manifest.tokenizer_sha256 == tokenizer.fingerprint
    for kind in ("bin", "idx"):
        raw = prefix.with_suffix(f".{kind}").read_bytes()
        assert manifest.sizes[kind] == len(raw)
        assert manifest.sha256[kind] == hashlib.sha256(raw).hexdigest()
    assert sorted(p.name for p in prefix.parent.iterdir()) == ["data.bin", "data.idx", "data.json"]


def test_no_eod_and_hugging_face(options: PreprocessOptions, hf_path: Path, texts: list[str]) -> None:
    prefix = made(options, append_eod=False, tokenizer=str(hf_path))
    tokenizer = load_tokenizer(hf_path)
    assert [tokenizer.decode(ids) for ids in documents(prefix)] == texts


def test_number_of_workers_and_size_of_blocks_change_nothing(options: PreprocessOptions) -> None:
    one = made(options, valid_fraction=0.3)
    two = made(options, valid_fraction=0.3, workers=2, block_bytes=10_000, output=f"{one}_two")
    for side in ("", "_valid"):
        for kind in ("bin", "idx"):
            assert Path(f"{one}{side}.{kind}").read_bytes() == Path(f"{two}{side}.{kind}").read_bytes()


def test_held_out_documents_depend_on_their_text_alone(
    options: PreprocessOptions, texts: list[str], tmp_path: Path
) -> None:
    prefix = made(options, valid_fraction=0.3)
    shuffled = [*texts, *texts[:5]]  # some twice
    random.Random(0).shuffle(shuffled)
    other = made(
        options,
        valid_fraction=0.3,
        inputs=(str(write_lines(tmp_path / "shuffled.jsonl", shuffled)),),
        output=str(tmp_path / "out/other"),
    )
    train, valid = documents(prefix), documents(f"{prefix}_valid")
    assert len(train) + len(valid) == len(texts)
    assert 3 <= len(valid) <= 24  # 12 expected
    for side, before in (("", train), ("_valid", valid)):
        assert {tuple(d) for d in documents(f"{other}{side}")} == {tuple(d) for d in before}
    more = made(options, valid_fraction=0.6, output=str(tmp_path / "out/more"))
    assert {tuple(d) for d in valid} < {tuple(d) for d in documents(f"{more}_valid")}


def test_skipped_lines_are_counted(options: PreprocessOptions, tmp_path: Path) -> None:
    source = tmp_path / "mixed.jsonl"
    source.write_text('{"text": "a long enough document of words"}\nbad\nbad\n{"text": "I"}\nbad\nbad\n{}\n')
    report = preprocess(dataclasses.replace(options, inputs=(str(source),), min_tokens=5))
    assert report.skipped == {"not JSON": 4, "fewer than 5 tokens": 1, "no key 'text'": 1}
    assert report.skipped_lines()[0] == f"4 x not JSON ({source}:2, {source}:3, {source}:5, ...)"
    assert f"1 x fewer than 5 tokens ({source}:4)" in report.skipped_lines()
    assert load_manifest(options.output).skipped == dict(report.skipped)
    assert load_manifest(options.output).documents == 1


def test_progress_counts_the_input(options: PreprocessOptions) -> None:
    seen: list[int] = []
    preprocess(
        dataclasses.replace(options, block_bytes=50_000), lambda report: seen.append(report.disk_bytes)
    )
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == Path(options.inputs[0]).stat().st_size


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_nothing_behind(options: PreprocessOptions, tmp_path: Path, workers: int) -> None:
    (tmp_path / "late.jsonl.gz").write_bytes(b"\x1f\x8b\x08 damaged")
    inputs = (*options.inputs, str(tmp_path / "late.jsonl.gz"))
    with pytest.raises(DataError, match="damaged"):
        made(options, inputs=inputs, workers=workers, block_bytes=20_000)
    assert list(Path(options.output).parent.iterdir()) == []


def test_overwrite(options: PreprocessOptions, texts: list[str], tmp_path: Path) -> None:
    prefix = made(options, valid_fraction=0.3)
    before = {p.name: p.read_bytes() for p in prefix.parent.iterdir()}
    with pytest.raises(DataError, match=r"data\.bin exists already; give --overwrite or another --output"):
        made(options, valid_fraction=0.3)
    with pytest.raises(DataError, match=r"data_valid\.bin exists already; remove it"):
        made(options, overwrite=True)  # its held-out documents would be trained on
    assert {p.name: p.read_bytes() for p in prefix.parent.iterdir()} == before
    half = write_lines(tmp_path / "half.jsonl", texts[:20])
    made(options, valid_fraction=0.3, overwrite=True, inputs=(str(half),))
    assert load_manifest(prefix).documents + load_manifest(f"{prefix}_valid").documents == 20
    assert {p.name for p in prefix.parent.iterdir()} == set(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_fraction": 1.0}, r"valid_fraction=1\.0 must lie in \[0, 1\)"),
        ({"valid_fraction": 1e-9}, r"valid_fraction=1e-09 leaves no held-out document of 40"),
        ({"valid_fraction": 0.9999999}, r"valid_fraction=0\.9999999 leaves no training document of 40"),
        ({"workers": 0}, r"workers=0 must be at least 1"),
        ({"json_key": "body"}, r"no document found in .*: 40 x no key 'body' \(.*in\.jsonl:1, .*, \.\.\.\)"),
        ({"min_tokens": 10**9}, r"40 x fewer than 1000000000 tokens"),
        ({"output": "data/x.bin"}, r"output data/x\.bin must be a path without \.bin"),
        ({"tokenizer": "none.model"}, r"none\.model: no such file"),
        ({"inputs": ("none.jsonl",)}, r"none\.jsonl: no such file"),
        ({"vocab_size": 511}, r"vocab_size=511 must be at least 512, the ids of .*; leave it out"),
    ],
)
def test_options_that_make_no_dataset(
    options: PreprocessOptions, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        made(options, **changes)
    parent = Path(options.output).parent
    assert not parent.exists() or list(parent.iterdir()) == []


def test_tokenizer_without_an_end_of_document(options: PreprocessOptions, hf_words_path: Path) -> None:
    with pytest.raises(DataError, match=r"no end-of-document token.*--no-append-eod"):
        made(options, tokenizer=str(hf_words_path))
    prefix = made(options, tokenizer=str(hf_words_path), append_eod=False)
    assert load_manifest(prefix).eod_id is None
    assert np.concatenate(documents(prefix)).max() < 8


def test_prompts_are_sequences_of_their_own(
    options: PreprocessOptions, texts: list[str], tmp_path: Path
) -> None:
    """A document is its prompt, perhaps empty, and the rest with its end; equal answers may be split."""
    pairs = [(text[: n % 5 * 10], text[n % 5 * 10 : 200]) for n, text in enumerate(texts)]
    source = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"question": prompt, "text": text}) for prompt, text in pairs]
    source.write_text("\n".join([*lines, '{"text": "no prompt"}', '{"question": 3, "text": "x"}']))
    (tmp_path / "plain.txt").write_text("no prompt either")
    inputs = (str(source), str(tmp_path / "plain.txt"))
    report = preprocess(dataclasses.replace(options, inputs=inputs, prompt_key="question"))
    tokenizer = load_tokenizer(options.tokenizer)
    dataset = open_indexed(options.output)
    assert dataset.document_indices.tolist() == list(range(0, 2 * len(pairs) + 1, 2))
    for n, (prompt, text) in enumerate(pairs):
        assert dataset[2 * n].tolist() == tokenizer.encode(prompt)
        assert dataset[2 * n + 1].tolist() == [*tokenizer.encode(text), tokenizer.eod_id]
    manifest = load_manifest(options.output)
    assert manifest.documents == len(pairs)
    assert manifest.prompt_tokens == sum(len(tokenizer.encode(prompt)) for prompt, _ in pairs)
    assert manifest.prompt_bytes == sum(len(prompt.encode()) for prompt, _ in pairs)
    rest_bytes = sum(len(text.encode()) for _, text in pairs)
    rest_tokens = sum(len(tokenizer.encode(text)) + 1 for _, text in pairs)
    assert manifest.scored_bytes_per_token(True) == pytest.approx(rest_bytes / rest_tokens)
    assert manifest.scored_bytes_per_token(False) == manifest.bytes_per_token
    assert report.skipped == {
        "no key 'question'": 1,
        "'question' is not a string": 1,
        "plain text, which has no 'question'": 1,
    }


def test_a_model_may_have_more_rows_than_the_tokenizer_ids(
    options: PreprocessOptions, llada_path: Path
) -> None:
    prefix = made(options, tokenizer=str(llada_path), vocab_size=126_464)
    manifest = load_manifest(prefix)
    assert (manifest.vocab_size, manifest.mask_id, manifest.eod_id) == (126_464, 126_336, 126_081)
    assert manifest.dtype == "int32"
    ids = np.concatenate(documents(prefix))
    assert (ids == 126_081).sum() == manifest.documents
    assert (ids != 126_336).all()
    assert ids.max() == 126_081
