import hashlib
import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import models

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.tokenizer import MASK_GLYPH, Tokenizer, load_tokenizer

NASTY = [
    "",
    "\n",
    " two  blanks\n\n\tand a tab \n",
    "x\r\ny",
    "naïve 日本語 \U0001f600",
    "a\x00b",
    "<mask> a<mask>b<mask><mask> [MASK] <|mask|><|mask|> </s> <|endoftext|> <0x41>",
]


@pytest.fixture(params=["sp_path", "hf_path", "hf_plain_mask_path"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def user_defined_model(texts: list[str], path: Path) -> Path:
    """A SentencePiece model whose mask the library does match in text, with the dummy prefix of Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).split("\n")),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<mask>", "\n"],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("text", NASTY)
def test_text_comes_back_whole(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_real_text_comes_back_whole(tokenizer: Tokenizer, texts: list[str]) -> None:
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert batch == [tokenizer.encode(text) for text in texts]
    assert all(0 <= i < tokenizer.vocab_size for ids in batch for i in ids)


@pytest.mark.parametrize("text", NASTY)
def test_text_never_makes_mask_or_end(tokenizer: Tokenizer, text: str) -> None:
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text, text])):
        assert tokenizer.mask_id not in ids
        assert tokenizer.eod_id not in ids


def test_no_special_token_comes_from_text(hf_path: Path) -> None:
    raw = tokenizers.Tokenizer.from_file(str(hf_path))
    assert raw.encode("king<|pad|>").ids[-1] == 2, "the library would make it: else this test says nothing"
    assert 2 not in load_tokenizer(hf_path).encode("king<|pad|>")


def test_user_defined_mask_is_never_made(texts: list[str], tmp_path: Path) -> None:
    path = user_defined_model(texts, tmp_path / "user.model")
    raw = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    text = "The <mask> of kings, a<mask>b"
    assert tokenizer.mask_id in raw.encode(text), "the library would make it: else this test says nothing"
    assert tokenizer.mask_id not in tokenizer.encode(text)
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]
    # the dummy prefix may add blanks around the spelling, nothing else
    assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_mask_that_is_a_word_is_never_made(hf_words_path: Path) -> None:
    tokenizer = load_tokenizer(hf_words_path)
    assert tokenizer.encode("king [MASK] queen") == [2, 0, 0, 7]  # "[" and "MASK]" are unknown words
    assert tokenizer.vocab_size == 8, "ids have holes: the largest counts"
    assert tokenizer.eod_id is None


def test_mask_that_stands_for_unknown_words_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(models.WordLevel({"<mask>": 0, "king": 1}, "<mask>")).save(str(path))
    with pytest.raises(DataError, match="the text '<mask>' makes the reserved id 0 however it is cut"):
        load_tokenizer(path)


def test_mask_that_shares_its_id_is_refused(hf_path: Path, tmp_path: Path) -> None:
    record = json.loads(hf_path.read_text())
    mask = next(token for token in record["added_tokens"] if token["content"] == "<|mask|>")
    mask["id"] = record["model"]["vocab"]["<|mask|>"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"<\|mask\|>.* share the mask's id 300;"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_ids_and_fingerprint(sp_path: Path, hf_path: Path) -> None:
    sp, hf = load_tokenizer(sp_path), load_tokenizer(str(hf_path))
    assert (sp.vocab_size, sp.mask_id, sp.eod_id, sp.name) == (512, 2, 1, "tiny.model")
    assert (hf.vocab_size, hf.mask_id, hf.eod_id) == (600, 1, 0)
    assert hf.name.endswith("/tokenizer.json")
    assert hf.name.startswith("tiny-bpe")
    assert sp.fingerprint == hashlib.sha256(sp_path.read_bytes()).hexdigest()


def test_lladas_special_tokens(llada_path: Path) -> None:
    tokenizer = load_tokenizer(llada_path)
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eod_id) == (126_349, 126_336, 126_081)
    text = "a<|mdm_mask|>b<|endoftext|>[gMASK]<|reserved_token_3|>"
    assert max(tokenizer.encode(text)) < 256
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rows_without_a_token_are_shown(llada_path: Path, sp_path: Path) -> None:
    """Noise that is uniform over an embedding's rows makes ids that the tokenizer does not have."""
    for path, row in ((llada_path, 126_463), (sp_path, 512)):
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode("king")
        assert tokenizer.token_strings([*ids, row, tokenizer.mask_id])[-2:] == [f"<{row}>", MASK_GLYPH]
        assert tokenizer.decode([*ids, row]) == "king"


def test_token_strings_show_blanks_and_masks(tokenizer: Tokenizer) -> None:
    text = "O that this\n  too too solid flesh"
    ids = tokenizer.encode(text)
    assert "".join(tokenizer.token_strings(ids)) == text
    assert tokenizer.token_strings([tokenizer.mask_id, ids[0]])[0] == MASK_GLYPH
    assert MASK_GLYPH not in tokenizer.decode([tokenizer.mask_id])


def test_errors_name_value_rule_and_cure(tmp_path: Path, sp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must end in one of '\.model', '\.json' \(got '\.vocab'\)"):
        load_tokenizer("x.vocab")
    with pytest.raises(DataError, match=r"no such file; train one with tools/train_tokenizer\.py"):
        load_tokenizer(tmp_path / "none.model")
    for name, kind in (("bad.model", "SentencePiece model"), ("bad.json", r"Hugging Face tokenizer\.json")):
        (tmp_path / name).write_bytes(b"\xffnonsense")
        with pytest.raises(DataError, match=f"{name} is not a {kind}"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "cut.model").write_bytes(sp_path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut\.model"):
        load_tokenizer(tmp_path / "cut.model")
    tokenizers.Tokenizer(models.WordLevel({"king": 0}, "king")).save(str(tmp_path / "maskless.json"))
    with pytest.raises(
        DataError, match=r"no mask among its 1 tokens; one of <mask> \[MASK\].*add_special_tokens"
    ):
        load_tokenizer(tmp_path / "maskless.json")
