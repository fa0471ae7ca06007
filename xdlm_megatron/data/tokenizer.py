"""Tokenizers behind one small protocol: SentencePiece's `.model` and Hugging Face's `tokenizer.json`.

Text never makes the mask: a text that spells the mask token comes out as the ordinary pieces of that
spelling. The diffusion process alone writes `mask_id`. The same holds for the end-of-document id.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from xdlm_megatron.data.errors import DataError

# Spellings in use, the most telling first. A mask is never guessed from an id.
MASK_TOKENS = ("<mask>", "[MASK]", "<|mask|>", "<|mdm_mask|>", "<|MASK|>", "[mask]", "<MASK>")
EOD_TOKENS = ("<eod>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "[SEP]")
MASK_GLYPH = "░"  # how `token_strings` draws the mask


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer.

    vocab_size: the number of ids, the mask counted; every id lies in [0, vocab_size).
    eod_id: the end of a document, None where the file has no such token.
    fingerprint: sha256 of the file, hexadecimal.
    """

    name: str
    fingerprint: str
    vocab_size: int
    mask_id: int
    eod_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is added, and neither mask_id nor eod_id occurs."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts; faster than one by one."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, as the tokenizer's library gives it."""

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """One printable piece an id, blanks in place of the library's marks and MASK_GLYPH for the mask.

        An id that the file does not have, as embeddings may have rows without a token, comes as <id>.
        """


class _Spelled:
    """Replaces ids that text must not make by the ids of their spelling, cut after its first character."""

    def __init__(self, encode: Any, tokens: dict[int, str], path: Path) -> None:
        """encode: text -> ids by the library; tokens: {id: spelling}, the ids that text must not make."""
        self.pieces = {i: [*encode(token[:1]), *encode(token[1:])] for i, token in tokens.items()}
        for token_id, pieces in self.pieces.items():
            if any(reserved in pieces for reserved in tokens):
                raise DataError(
                    f"{path}: the text {tokens[token_id]!r} makes the reserved id {token_id} however it is "
                    "cut, and text must never do so; make it a control (special) token of several characters"
                )

    def __call__(self, ids: list[int]) -> list[int]:
        for token_id, pieces in self.pieces.items():
            if token_id in ids:
                ids = [i for j in ids for i in (pieces if j == token_id else (j,))]
        return ids


class SentencePieceTokenizer:
    """A SentencePiece `.model`; its mask is a control or user-defined symbol."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        raw = path.read_bytes()
        self.name = path.name
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except RuntimeError as error:
            raise DataError(
                f"{path} is not a SentencePiece model; train one with tools/train_tokenizer.py"
            ) from error
        self.vocab_size = self._model.piece_size()
        pieces = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        self.mask_id = _find_mask(
            pieces, path, "train it again with tools/train_tokenizer.py, which adds <mask>"
        )
        eos_id = self._model.eos_id()
        self.eod_id = eos_id if eos_id >= 0 else _first(EOD_TOKENS, pieces)
        # SentencePiece never matches a control symbol in text; other kinds it may.
        reachable = [
            i for i in (self.mask_id, self.eod_id) if i is not None and not self._model.is_control(i)
        ]
        self._spelled = _Spelled(self._encode, {i: self._model.id_to_piece(i) for i in reachable}, path)

    def _encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_bos=False, add_eos=False))

    def encode(self, text: str) -> list[int]:
        return self._spelled(self._encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: the callers run one process a core.
        batch = self._model.encode(list(texts), add_bos=False, add_eos=False, num_threads=1)
        return [self._spelled(ids) for ids in batch]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([int(i) for i in ids if i < self.vocab_size]))

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        return [self._piece(int(i)) for i in ids]

    def _piece(self, token_id: int) -> str:
        if token_id == self.mask_id:
            return MASK_GLYPH
        if token_id >= self.vocab_size:
            return f"<{token_id}>"
        return str(self._model.id_to_piece(token_id)).replace("▁", " ")


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library; nothing comes from a hub."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        raw = path.read_bytes()
        # Many models have a file of this one name; the folder tells them apart.
        self.name = f"{path.resolve().parent.name}/{path.name}"
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        try:
            self._model = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception, UnicodeDecodeError is ours
            raise DataError(f"{path} is not a Hugging Face tokenizer.json ({_one_line(error)})") from error
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # text that spells a special token stays text
        vocab = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1  # ids may have holes
        cure = "add one with tokenizers.Tokenizer.add_special_tokens(['<mask>']) and save the file again"
        self.mask_id = _find_mask(vocab, path, cure)
        self.eod_id = _first(EOD_TOKENS, vocab)
        self._bytes = (
            _byte_alphabet() if '"ByteLevel"' in json.dumps(json.loads(raw).get("decoder")) else None
        )
        reserved = [i for i in (self.mask_id, self.eod_id) if i is not None]
        self._spelled = _Spelled(self._encode, {i: str(self._model.id_to_token(i)) for i in reserved}, path)

    def _encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        return self._spelled(self._encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._spelled(encoding.ids) for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        return [self._piece(int(i)) for i in ids]

    def _piece(self, token_id: int) -> str:
        if token_id == self.mask_id:
            return MASK_GLYPH
        token = self._model.id_to_token(token_id)
        if token is None:
            return f"<{token_id}>"
        if self._bytes is not None and all(c in self._bytes for c in token):
            return bytes(self._bytes[c] for c in token).decode("utf-8", errors="replace")
        return str(token).replace("▁", " ")


# A new kind of tokenizer is a class like those above and a line here.
TOKENIZERS: dict[str, Any] = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer by its file's ending. Raises DataError (a ValueError) with value, rule and cure."""
    path = Path(path)
    if path.suffix not in TOKENIZERS:
        known = ", ".join(f"'{suffix}'" for suffix in TOKENIZERS)
        raise DataError(f"tokenizer {path}: the file's name must end in one of {known} (got '{path.suffix}')")
    if not path.is_file():
        raise DataError(f"tokenizer {path}: no such file; train one with tools/train_tokenizer.py")
    tokenizer: Tokenizer = TOKENIZERS[path.suffix](path)
    return tokenizer


def _find_mask(vocab: dict[str, int], path: Path, cure: str) -> int:
    mask_id = _first(MASK_TOKENS, vocab)
    if mask_id is None:
        spellings = " ".join(MASK_TOKENS)
        raise DataError(
            f"{path}: no mask among its {len(vocab)} tokens; one of {spellings} must be there; {cure}"
        )
    names = [token for token, token_id in vocab.items() if token_id == mask_id]
    if len(names) > 1:  # every text with the other token would seem masked
        raise DataError(f"{path}: the tokens {names} share the mask's id {mask_id}; give the mask its own")
    return mask_id


def _first(tokens: Iterable[str], vocab: dict[str, int]) -> int | None:
    return next((vocab[token] for token in tokens if token in vocab), None)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, as {character: byte}."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(moved)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
