"""Trains a SentencePiece tokenizer that loses nothing and has a mask of its own.

Identity normalisation, newlines as a piece and bytes as a fallback: decode(encode(text)) == text for any
UTF-8 text without U+2581, SentencePiece's own mark for a blank.
"""

import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from xdlm_megatron.data.documents import Skip, find_inputs, parse, read_blocks
from xdlm_megatron.data.errors import DataError

FIXED_IDS = 260
KINDS = ("unigram", "bpe")
MAX_LINE = 8192  # characters; longer lines are cut, for SentencePiece would leave them out without a word
NUM_THREADS = 2  # part of the result for unigram, whose sums depend on it: not a knob


def read_texts(inputs: tuple[str, ...], json_key: str, max_bytes: int | None = None) -> Iterator[str]:
    """Yields the documents of files and globs until about max_bytes of UTF-8; bad lines are left out."""
    used = 0
    skipped: Skip | None = None
    for block in read_blocks(find_inputs(inputs), 1 << 20):
        for item in parse(block, json_key):
            if isinstance(item, Skip):
                skipped = skipped or item
                continue
            (text,) = item.texts
            yield text
            used += len(text.encode("utf-8"))
            if max_bytes is not None and used >= max_bytes:
                return
    if used == 0:
        why = f"{skipped.where}: {skipped.reason}" if skipped else "the input is empty"
        raise DataError(f"no document found in {' '.join(inputs)}: {why}")


def train_sentencepiece(texts: Iterable[str], vocab_size: int, kind: str = "unigram") -> bytes:
    """Returns the model file's bytes; the same texts in the same order give the same bytes.

    vocab_size counts <unk>, </s> (end of document), <mask>, the newline and the 256 bytes. Raises DataError.
    """
    import sentencepiece

    if kind not in KINDS:
        raise DataError(f"model type {kind!r} must be one of {', '.join(KINDS)}")
    if vocab_size <= FIXED_IDS:
        raise DataError(
            f"vocab_size={vocab_size} must be more than {FIXED_IDS}: <unk>, </s>, <mask>, the newline and "
            "the 256 bytes take as many"
        )
    model = io.BytesIO()
    try:
        # From an iterator to a writer: no file names in the model, its bytes depend on the text alone.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            character_coverage=0.99995,  # rarer characters are bytes
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            control_symbols=["<mask>"],  # a control symbol: no text can make it
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * MAX_LINE,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(f"vocab_size={vocab_size} does not fit this text: {_reason(error)}") from error
    return model.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name, waits for the disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as stream:
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)
            os.replace(stream.name, path)
        except BaseException:
            os.unlink(stream.name)
            raise


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_LINE):
                yield line[start : start + MAX_LINE]


def _reason(error: Exception) -> str:
    """SentencePiece's sentence without its file, line and condition."""
    text = " ".join(str(error).split())
    return text.rsplit("] ", 1)[-1].split(" or decrease ")[0] or text  # a knob of its own, which is not ours
