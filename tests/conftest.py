"""A small real corpus, tokenized once a session: what every test that trains reads. The table of layouts."""

from __future__ import annotations

import gc
import lzma
import signal
from pathlib import Path

import pytest
import yaml

# A shell that starts us in the background ignores it, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parents[1]
CORPUS = REPOSITORY / "examples/data/shakespeare.jsonl.xz"
# Half a minute and more each. Begun last, one of them would leave the other worker of xdist idle.
LONG_FILES = ("test_gpu_image.py", "test_dockerfile.py", "test_study.py", "test_kernel_sanitizers.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: Megatron collects garbage at every save, and would visit all of it."""
    gc.freeze()


def make_tiny_data(folder: Path) -> dict[str, object]:
    """The `data` section of a recipe: 60 scenes in 256 SentencePiece ids, a part of them held out."""
    from xdlm_megatron.data.preprocess import PreprocessOptions, preprocess
    from xdlm_megatron.data.tokenizer import load_tokenizer
    from xdlm_megatron.data.train_tokenizer import train_sentencepiece

    with lzma.open(CORPUS, "rt") as stream:
        lines = [line for _, line in zip(range(60), stream, strict=False)]
    (folder / "text.jsonl").write_text("".join(lines))
    texts = [yaml.safe_load(line)["text"] for line in lines[:20]]
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(texts, 400))
    preprocess(
        PreprocessOptions(
            inputs=(str(folder / "text.jsonl"),),
            output=str(folder / "text"),
            tokenizer=str(folder / "tokenizer.model"),
            valid_fraction=0.1,
        ),
        lambda report: None,
    )
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    return {
        "train_prefix": str(folder / "text"),
        "valid_prefix": str(folder / "text_valid"),
        "tokenizer": str(folder / "tokenizer.model"),
        "seq_length": 32,
        "vocab_size": tokenizer.vocab_size,
        "mask_id": tokenizer.mask_id,
        "make_vocab_size_divisible_by": 16,
    }


def make_tiny_recipe(tiny_data: dict[str, object]) -> dict[str, dict]:
    """A recipe of a model that trains in milliseconds a step."""
    return {
        "run": {"name": "tiny", "seed": 7},
        "diffusion": {"uniform_ratio": 0.1},
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
        },
        "data": tiny_data,
        "optimizer": {"lr": 5e-3, "weight_decay": 0.1, "ema_decay": 0.9},
        "lr_schedule": {"kind": "cosine", "warmup_steps": 3},
        "train": {"num_steps": 20, "micro_batch_size": 2, "global_batch_size": 8, "log_interval": 1},
        "checkpoint": {"save_interval": 1000},
        "evaluation": {"interval": 10, "num_sequences": 20},
        "tracking": {"mlflow": None},
    }


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """See `make_tiny_data`; made once a session."""
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_recipe(tiny_data: dict[str, object]) -> dict[str, dict]:
    """See `make_tiny_recipe`; copy it before changing it."""
    return make_tiny_recipe(tiny_data)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of layouts, of properties of the tests: they come from a worker of xdist too."""
    done = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())]
    rows = [row for report in done for name, row in report.user_properties if name == "layout"]
    if rows:
        from tests.distributed.layouts import Row, table

        terminalreporter.section("layouts against one process, worst relative differences")
        terminalreporter.write_line(table(Row(**row) for row in rows))
