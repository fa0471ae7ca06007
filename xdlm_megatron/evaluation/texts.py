"""Local text files as held-out sets: JSON lines, detokenized, in the run's tokens and its packing.

Every token of a set is scored, the last piece padded, so that nats and bytes are of the same text.

Shape suffix: T positions of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.batch import DocumentRules, NoisedSamples
from xdlm_megatron.data.build import build_noise, build_schedule
from xdlm_megatron.data.detokenize import detokenize
from xdlm_megatron.data.documents import Skip, find_inputs, parse, read_blocks
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.packing import PADDING
from xdlm_megatron.data.sampler import SpreadIndex
from xdlm_megatron.data.tokenizer import Tokenizer
from xdlm_megatron.diffusion.counter_rng import Stream

BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class TextSet:
    """A file of texts, {"text": ...} a line, and the name of its rules in data/detokenize.py."""

    path: Path
    rules: str = "plain"

    def read(self) -> list[str]:
        """The texts as they are scored. Raises DataError on a line that has none."""
        found = []
        for block in read_blocks(find_inputs([str(self.path)]), BLOCK_BYTES):
            for document in parse(block, "text"):
                if isinstance(document, Skip):
                    raise DataError(f"{document.where}: {document.reason}; mend the line or take it out")
                found.append(detokenize(document.texts[0], self.rules))
        if not found:
            raise DataError(f"{self.path} has no texts; each line must be a JSON object with a 'text'")
        return found


class TextRows:
    """Documents of ids as samples (data/packing.py: Packing); what is short is padded at its end.

    packing: the recipe's: "stream" and "documents" end to end, "padded" a row each; "stream" reads a row as
    one text.
    """

    def __init__(self, documents: Sequence[Sequence[int]], seq_length: int, packing: str) -> None:
        self.seq_length = seq_length
        texts = [np.asarray(ids, dtype=np.int64) for ids in documents]
        numbers = [np.full(len(ids), 0 if packing == "stream" else n) for n, ids in enumerate(texts)]
        if packing != "padded":
            texts, numbers = [np.concatenate(texts)], [np.concatenate(numbers)]
        starts = [(n, at) for n, ids in enumerate(texts) for at in range(0, len(ids), seq_length)]
        self._ids = [texts[n][at : at + seq_length] for n, at in starts]
        self._documents = [numbers[n][at : at + seq_length] for n, at in starts]
        self.num_tokens = sum(map(len, texts))

    @property
    def summary(self) -> str:
        return f"{len(self)} samples"

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Ids, int64 [T]; 0 beyond the text."""
        return self._padded(self._ids[index], 0)

    def documents(self, index: int) -> NDArray[np.int32]:
        """Numbers from 0 on, then PADDING: int32 [T]."""
        numbers = self._documents[index]
        return self._padded(numbers - numbers[0], PADDING).astype(np.int32)

    def prompts(self, index: int) -> NDArray[np.bool_]:
        """None is a prompt: bool [T]."""
        return np.zeros(self.seq_length, dtype=np.bool_)

    def _padded(self, values: NDArray, value: int) -> NDArray:
        return np.pad(values, (0, self.seq_length - len(values)), constant_values=value)


def build_text_samples(
    config: RunConfig, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device, positions: slice
) -> tuple[NoisedSamples, float]:
    """At most evaluation.num_sequences samples of the texts with held-out noise; and bytes per token.

    A document ends with the end-of-document id where the tokenizer has one, as in training; it counts as a
    token, and has no bytes.
    """
    end = [] if tokenizer.eod_id is None else [tokenizer.eod_id]
    documents = [[*ids, *end] for ids in tokenizer.encode_batch(texts)]
    rows = TextRows(documents, config.data.seq_length, config.data.packing)
    samples = NoisedSamples(
        dataset=rows,
        index=SpreadIndex(min(len(rows), config.evaluation.num_sequences), len(rows)),
        noise=build_noise(config),
        schedule=build_schedule(config.diffusion),
        seed=config.run.seed,
        t_min=config.diffusion.t_min,
        streams=(Stream.EVAL_TIME, Stream.EVAL_NOISE),
        device=device,
        positions=positions,
        rules=DocumentRules(separate=True, time_per_document=config.diffusion.time_per == "document"),
    )
    return samples, sum(len(text.encode()) for text in texts) / rows.num_tokens
