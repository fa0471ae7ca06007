"""Text to token ids in worker processes. Nothing here imports torch."""

import hashlib
import itertools
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from xdlm_megatron.data.documents import Block, Skip, parse
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.indexed import dtype_for
from xdlm_megatron.data.tokenizer import load_tokenizer

Pieces = list[list[int]]  # a document's ids: its own, or its prompt's and the rest


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What a worker needs to know; see `preprocess.PreprocessOptions`."""

    tokenizer: str
    json_key: str = "text"
    prompt_key: str | None = None
    append_eod: bool = True
    valid_fraction: float = 0.0
    min_tokens: int = 1


@dataclass(frozen=True)
class Part:
    """Documents of a block on one side of the split.

    ids: all their tokens; lengths: int32 [documents, 1], or [documents, 2] of prompt and rest; text_bytes: of
    both, prompt_bytes: of the prompts.
    """

    ids: NDArray[np.unsignedinteger | np.signedinteger]
    lengths: NDArray[np.int32]
    text_bytes: int
    prompt_bytes: int


@dataclass(frozen=True)
class Encoded:
    """What becomes of a block. parts: (train, valid)."""

    parts: tuple[Part, Part]
    skips: list[Skip]
    disk_bytes: int


class BlockEncoder:
    """Parses and encodes blocks; there is one in each worker."""

    def __init__(self, options: EncodeOptions) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(options.tokenizer)
        self.dtype = dtype_for(self.tokenizer.vocab_size)
        self.eod: list[int] = []
        if options.append_eod:
            if self.tokenizer.eod_id is None:
                raise DataError(
                    f"{options.tokenizer} has no end-of-document token, and documents must end with one; "
                    "take another tokenizer, or --no-append-eod"
                )
            self.eod = [self.tokenizer.eod_id]

    def __call__(self, block: Block) -> Encoded:
        parsed = list(parse(block, self.options.json_key, self.options.prompt_key))
        skips = [item for item in parsed if isinstance(item, Skip)]
        documents = [item for item in parsed if not isinstance(item, Skip)]
        sides: tuple[list[Pieces], list[Pieces]] = ([], [])
        num_bytes = np.zeros((2, 2), dtype=np.int64)  # side, (all pieces, prompts)
        encoded = self.tokenizer.encode_batch([text for document in documents for text in document.texts])
        pieces_of = iter(encoded)
        for document in documents:
            *prompt, ids = [next(pieces_of) for _ in document.texts]
            if len(ids) < self.options.min_tokens:
                skips.append(Skip(document.where, f"fewer than {self.options.min_tokens} tokens"))
                continue
            raw = [text.encode("utf-8") for text in document.texts]
            side = int(is_held_out(b"".join(raw), self.options.valid_fraction))
            sides[side].append([*prompt, ids + self.eod])
            num_bytes[side] += (sum(map(len, raw)), sum(map(len, raw[:-1])))
        parts = (self._part(sides[0], *num_bytes[0]), self._part(sides[1], *num_bytes[1]))
        return Encoded(parts, skips, block.disk_bytes)

    def _part(self, documents: list[Pieces], text_bytes: int, prompt_bytes: int) -> Part:
        width = 1 if self.options.prompt_key is None else 2
        lengths = np.array([[len(piece) for piece in pieces] for pieces in documents], dtype=np.int32)
        ids = np.fromiter(
            itertools.chain.from_iterable(piece for pieces in documents for piece in pieces),
            dtype=np.int64,
            count=int(lengths.sum()),
        )
        assert ids.size == 0 or 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size
        assert not (ids == self.tokenizer.mask_id).any(), "the tokenizer made the mask from text"
        return Part(ids.astype(self.dtype), lengths.reshape(-1, width), int(text_bytes), int(prompt_bytes))


def is_held_out(raw: bytes, fraction: float) -> bool:
    """Whether a document's UTF-8 text belongs to the held-out part.

    Its hash decides, so neither order nor other documents matter, and equal texts stay on one side.
    """
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def encode_blocks(blocks: Iterable[Block], options: EncodeOptions, workers: int) -> Iterator[Encoded]:
    """Encodes blocks by `workers` processes (1: in this one), in input order, a few waiting at a time."""
    if workers == 1:
        yield from map(BlockEncoder(options), blocks)
        return
    # Spawned, not forked: the parent has threads. It starts what it needs only, so a small input is quick.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (options,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(_encode, block))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died; the machine may be short of memory: take fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: BlockEncoder | None = None  # a worker's own; set once by _start_worker


def _start_worker(options: EncodeOptions) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C and stops us
    os.environ["RAYON_NUM_THREADS"] = "1"  # the parallelism is ours: one process a core
    _encoder = BlockEncoder(options)


def _encode(block: Block) -> Encoded:
    assert _encoder is not None
    return _encoder(block)
