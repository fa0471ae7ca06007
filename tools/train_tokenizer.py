#!/usr/bin/env python3
"""Trains a SentencePiece tokenizer with a mask of its own from JSON lines or plain text (.gz and .xz too).

    python tools/train_tokenizer.py --input examples/data/shakespeare.jsonl.xz --vocab-size 2048 \\
        --output data/shakespeare.model

Newlines and blanks survive encoding and decoding, unknown characters become bytes. The same input gives the
same file.
"""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.tokenizer import load_tokenizer
from xdlm_megatron.data.train_tokenizer import KINDS, read_texts, train_sentencepiece, write_whole


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files or quoted globs")
    parser.add_argument("--output", required=True, type=Path, metavar="PATH.model")
    parser.add_argument("--vocab-size", type=int, required=True, help="ids in all, the mask counted")
    parser.add_argument("--model-type", choices=KINDS, default="unigram")
    parser.add_argument(
        "--json-key", default="text", help="the key of the text in JSON lines (default: text)"
    )
    parser.add_argument(
        "--max-megabytes",
        type=int,
        default=100,
        help="text to learn from, the first N MB (default: 100; all: 0)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser.parse_args()


def train(arguments: argparse.Namespace) -> None:
    """Reads, trains, writes and reports."""
    if arguments.output.suffix != ".model":
        raise DataError(f"output {arguments.output} must end in .model, by which the tokenizer is known")
    if arguments.output.exists() and not arguments.overwrite:
        raise DataError(f"output {arguments.output} exists already; give --overwrite or another --output")
    if arguments.max_megabytes < 0:
        raise DataError(f"max_megabytes={arguments.max_megabytes} must be at least 0, which means all")
    begin = time.perf_counter()
    limit = arguments.max_megabytes * 1_000_000 or None
    texts: list[str] = []
    # tqdm is silent where stderr is no terminal.
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None) as bar:
        for text in read_texts(tuple(arguments.input), arguments.json_key, limit):
            texts.append(text)
            bar.update(len(text.encode("utf-8")))
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    print(
        f"learning {arguments.vocab_size} pieces ({arguments.model_type}) from {num_bytes:,} bytes ...",
        flush=True,
    )
    write_whole(arguments.output, train_sentencepiece(texts, arguments.vocab_size, arguments.model_type))

    tokenizer = load_tokenizer(arguments.output)
    sample = texts[:: max(1, len(texts) // 1000)]  # a thousand documents tell the bytes a token
    num_tokens = sum(map(len, tokenizer.encode_batch(sample)))
    sample_bytes = sum(len(text.encode("utf-8")) for text in sample)
    print(
        f"{arguments.output}: vocab_size {tokenizer.vocab_size}, mask_id {tokenizer.mask_id}, "
        f"eod_id {tokenizer.eod_id}, {sample_bytes / num_tokens:.3f} bytes a token, "
        f"{time.perf_counter() - begin:.1f} s\nsha256 {tokenizer.fingerprint}"
    )


def main() -> int:
    try:
        train(parse_arguments())
    except (DataError, OSError) as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_tokenizer: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
