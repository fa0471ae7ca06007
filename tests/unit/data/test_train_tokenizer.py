import json
from pathlib import Path

import pytest

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.tokenizer import load_tokenizer
from xdlm_megatron.data.train_tokenizer import MAX_LINE, read_texts, train_sentencepiece, write_whole


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_same_text_same_bytes(texts: list[str], tmp_path: Path, kind: str) -> None:
    model = train_sentencepiece(iter(texts), 400, kind)
    assert train_sentencepiece(texts, 400, kind) == model
    assert train_sentencepiece(texts[:20], 400, kind) != model
    write_whole(tmp_path / "deep/er/a.model", model)
    assert load_tokenizer(tmp_path / "deep/er/a.model").vocab_size == 400
    assert [p.name for p in (tmp_path / "deep/er").iterdir()] == ["a.model"]


def test_learns_words_not_bytes(sp_path: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(sp_path)
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    assert 1.5 < num_bytes / num_tokens < 4
    assert tokenizer.token_strings(tokenizer.encode("and the king\n"))[0] in ("and", "an")
    assert tokenizer.encode("\n\n") == [tokenizer.encode("\n")[0]] * 2


def test_long_lines_and_nul_are_learnt_from(tmp_path: Path) -> None:
    line = "\x00mumbling thunder " * (3 * MAX_LINE // 16)
    (tmp_path / "a.model").write_bytes(train_sentencepiece([line], 275))
    tokenizer = load_tokenizer(tmp_path / "a.model")
    assert len(tokenizer.encode("mumbling thunder ")) < 17, "a line that was left out teaches nothing"


@pytest.mark.parametrize("size", [-5, 0, 1, 260])
def test_vocabulary_without_room_for_a_piece(size: int) -> None:
    with pytest.raises(
        DataError, match=rf"^vocab_size={size} must be more than 260: .*the 256 bytes take as many"
    ):
        train_sentencepiece(["abc"], size)


@pytest.mark.parametrize(("size", "reason"), [(100_000, "too high"), (270, "Increase vocab_size$")])
def test_vocabulary_that_does_not_fit(texts: list[str], size: int, reason: str) -> None:
    with pytest.raises(DataError, match=rf"^vocab_size={size} does not fit this text: .*{reason}") as caught:
        train_sentencepiece(texts, size)
    assert "\n" not in str(caught.value)


def test_unknown_kind() -> None:
    with pytest.raises(DataError, match="'wordpiece' must be one of unigram, bpe"):
        train_sentencepiece(["a"], 300, "wordpiece")


def test_read_texts_stops_and_complains(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("not json\n" + "".join(json.dumps({"text": "x" * 100}) + "\n" for _ in range(50)))
    assert len(list(read_texts((str(path),), "text"))) == 50
    assert len(list(read_texts((str(path),), "text", max_bytes=250))) == 3
    with pytest.raises(DataError, match=r"no document found in .*a\.jsonl:1: not JSON"):
        list(read_texts((str(path),), "body"))
