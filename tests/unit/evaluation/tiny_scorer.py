"""A causal language model of six words, as a folder that a scorer reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def write_scorer(folder: Path) -> Any:
    """The network that was written; skips where transformers are missing."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["<s>", "to", "be", "or", "not", "?"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", unk_token="?")
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=6, n_embd=16, n_layer=1, n_head=2, n_positions=9)
    torch.manual_seed(0)
    network = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(5)
    network.save_pretrained(folder)
    return network
