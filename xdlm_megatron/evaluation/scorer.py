"""A causal language model of Hugging Face's transformers, read from a local folder, as judge of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from xdlm_megatron.checkpoint.integrity import describe
from xdlm_megatron.data.errors import DataError


@dataclass(frozen=True)
class Scored:
    """-log p of a text in nats, the tokens that it has for the scorer, and its UTF-8 bytes."""

    nats: float
    num_tokens: int
    num_bytes: int


class Scorer(Protocol):
    """Judges texts. name: of the model, in tables; fingerprint: of its weights."""

    name: str
    fingerprint: str

    def __call__(self, text: str) -> Scored: ...


class CausalScorer:
    """p(text) from its first token on, after the scorer's token for a beginning.

    Texts longer than its context are scored in pieces of that length, each after a beginning of its own:
    nothing is dropped.
    """

    def __init__(self, path: Path, device: str = "cpu", dtype: str = "float32") -> None:
        """path: a folder as `save_pretrained` writes it, or a .gguf file. dtype: in which it computes, a name
        of torch's; bfloat16 is faster and is part of the scorer's name. Raises DataError.
        """
        if not path.exists():
            raise DataError(
                f"scorer {path}: no such folder; give one with config.json, weights and tokenizer"
            )
        try:
            import transformers
        except ImportError:
            raise DataError("a scorer needs transformers; pip install 'xdlm_megatron[scorer]'") from None
        gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = str(path.parent if gguf else path)
        local: dict[str, Any] = {"local_files_only": True, **gguf}
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **local)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), **local
            )
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"scorer {path} cannot be read: {_first_line(error)}") from error
        self._model = model.to(device).eval()
        begin = self._tokenizer.bos_token_id
        self._begin = self._tokenizer.eos_token_id if begin is None else begin
        if self._begin is None:
            raise DataError(f"scorer {path} has no token for a beginning (bos or eos); take another")
        self._context = int(getattr(model.config, "max_position_embeddings", 1024)) - 1
        self.name = f"{path.name} in {dtype}"
        self.fingerprint = scorer_fingerprint(path)

    @torch.no_grad()
    def __call__(self, text: str) -> Scored:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        nats = sum(self._piece(ids[at : at + self._context]) for at in range(0, len(ids), self._context))
        return Scored(nats, len(ids), len(text.encode()))

    @torch.no_grad()
    def features(self, text: str) -> np.ndarray:
        """float32 [H]: the last layer's output at the text's last token, within the first context."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"][: self._context]
        input_ids = torch.tensor([[self._begin, *ids]], device=self._model.device)
        states = self._model(input_ids=input_ids, output_hidden_states=True).hidden_states
        return states[-1][0, -1].float().cpu().numpy()

    def _piece(self, ids: list[int]) -> float:
        input_ids = torch.tensor([[self._begin, *ids]], device=self._model.device)
        log_p = self._model(input_ids=input_ids).logits[0, :-1].float().log_softmax(-1)
        return -log_p.gather(1, input_ids[0, 1:, None]).double().sum().item()


def scorer_fingerprint(path: Path) -> str:
    """Checksums of the files of a folder, or of a .gguf file."""
    folder, files = path.parent, [path.name]
    if path.suffix != ".gguf":
        folder, files = path, sorted(each.name for each in path.iterdir() if each.is_file())
    sums = describe(folder, files)
    return ",".join(f"{name}:{sums[name]['checksum']}" for name in files)


def score_all(scorer: Scorer, texts: Sequence[str], label: str) -> list[Scored]:
    """Of every text, with a progress bar."""
    return [scorer(text) for text in tqdm(texts, desc=label, disable=None, leave=False)]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
