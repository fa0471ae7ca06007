"""Real tokenizers, trained once on a slice of the bundled corpus."""

import json
import lzma
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from xdlm_megatron.data.train_tokenizer import train_sentencepiece

CORPUS = Path(__file__).parents[3] / "examples/data/shakespeare.jsonl.xz"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Forty scenes, about 200 kB."""
    with lzma.open(CORPUS, "rt") as stream:
        return [json.loads(line)["text"] for _, line in zip(range(40), stream, strict=False)]


@pytest.fixture(scope="session")
def sp_path(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sp") / "tiny.model"
    path.write_bytes(train_sentencepiece(texts, 512))
    return path


def train_byte_level(texts: list[str], special_tokens: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE of 600 ids like GPT-2's."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return model


@pytest.fixture(scope="session")
def hf_path(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with special tokens <|endoftext|> 0, <|mask|> 1, <|pad|> 2."""
    path = tmp_path_factory.mktemp("tiny-bpe") / "tokenizer.json"
    train_byte_level(texts, ["<|endoftext|>", "<|mask|>", "<|pad|>"]).save(str(path))
    return path


@pytest.fixture(scope="session")
def hf_plain_mask_path(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with [MASK] as an ordinary added token, which the library matches in text."""
    path = tmp_path_factory.mktemp("plain-mask") / "tokenizer.json"
    model = train_byte_level(texts, ["<|endoftext|>"])
    model.add_tokens([AddedToken("[MASK]", special=False, normalized=False)])
    model.save(str(path))
    return path


@pytest.fixture(scope="session")
def llada_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Special tokens at the ids of LLaDA's tokenizer.json, 126080 to 126348; 256 of the others are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"unused{n}" for n in range(126_080 - len(alphabet)))]
    model = tokenizers.Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]"]
    special += [f"<|reserved_token_{n}|>" for n in range(265)]
    special[126_336 - 126_080] = "<|mdm_mask|>"
    model.add_special_tokens(special)
    path = tmp_path_factory.mktemp("llada") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="session")
def hf_words_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole words split at blanks; [MASK] is a word like the others, and no end of document."""
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    model = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "king": 2, "queen": 7}, "[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(path))
    return path
