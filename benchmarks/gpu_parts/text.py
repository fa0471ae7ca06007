"""A training set without network and tokenizer: the bundled plays, a word an id, the most frequent first."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections import Counter
from pathlib import Path

import numpy as np

from xdlm_megatron.data.indexed import Manifest, dtype_for, megatron_indexed

PLAYS = Path(__file__).resolve().parents[2] / "examples/data/shakespeare.jsonl.xz"


def write_training_set(folder: Path, vocab_size: int, documents: int | None = None) -> list[str]:
    """Writes it to `folder` and gives the overrides by which a recipe reads it; the mask is the last id.

    Words that are rarer than the vocabulary is large share ids. documents: only the first ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lzma.open(PLAYS, "rt") as stream:
        texts = [json.loads(line)["text"] for _, line in zip(range(documents or 10**9), stream, strict=False)]
    words = [re.findall(r"\w+|[^\w ]", text) for text in texts]
    ranked = Counter(word for text in words for word in text).most_common()
    ids = {word: rank % (vocab_size - 1) for rank, (word, _) in enumerate(ranked)}
    stem, tokenizer = folder / "plays", folder / "plays.words"
    tokenizer.write_text("\n".join(map(repr, ids)))
    builder = megatron_indexed().IndexedDatasetBuilder(f"{stem}.bin", dtype=dtype_for(vocab_size))
    for text in words:
        builder.add_document(np.array([ids[word] for word in text], dtype=dtype_for(vocab_size)), [len(text)])
    builder.finalize(f"{stem}.idx")
    _manifest(stem, tokenizer, vocab_size, texts, sum(map(len, words))).write(Path(f"{stem}.json"))
    return [
        f"data.train_prefix={stem}",
        "data.valid_prefix=null",
        f"data.tokenizer={tokenizer}",
        f"data.vocab_size={vocab_size}",
        f"data.mask_id={vocab_size - 1}",
    ]


def _manifest(stem: Path, tokenizer: Path, vocab_size: int, texts: list[str], tokens: int) -> Manifest:
    files = {kind: Path(f"{stem}.{kind}") for kind in ("bin", "idx")}
    text_bytes = sum(len(text.encode()) for text in texts)
    return Manifest(
        documents=len(texts),
        tokens=tokens,
        text_bytes=text_bytes,
        bytes_per_token=round(text_bytes / tokens, 4),
        tokenizer=tokenizer.name,
        tokenizer_sha256=_sha256(tokenizer),
        vocab_size=vocab_size,
        mask_id=vocab_size - 1,
        eod_id=None,
        append_eod=False,
        dtype=dtype_for(vocab_size).__name__,
        skipped={},
        sizes={kind: path.stat().st_size for kind, path in files.items()},
        sha256={kind: _sha256(path) for kind, path in files.items()},
        arguments={},
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
