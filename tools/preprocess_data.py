#!/usr/bin/env python3
"""Turns JSON lines or plain text (.gz and .xz too) into Megatron's indexed dataset.

    python tools/preprocess_data.py --input examples/data/shakespeare.jsonl.xz \\
        --tokenizer data/shakespeare.model --output data/shakespeare --valid-fraction 0.05

writes PREFIX.bin, PREFIX.idx and the manifest PREFIX.json, and with --valid-fraction the same of
PREFIX_valid, whose documents are chosen by a hash of their text. A .txt file is one document. A line that is
no document is skipped and reported. The result does not depend on the number of workers.
"""

import argparse
import os
import signal
import sys
import time

from tqdm import tqdm

from xdlm_megatron.data.documents import find_inputs
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.preprocess import PreprocessOptions, Report, preprocess


def parse_arguments() -> PreprocessOptions:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flag = parser.add_argument
    flag("--input", nargs="+", required=True, metavar="FILE", help="files or quoted globs")
    flag("--output", required=True, metavar="PREFIX", help="path of the dataset without .bin/.idx")
    flag(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="SentencePiece .model or Hugging Face tokenizer.json",
    )
    flag("--json-key", default="text", help="the key of the text in JSON lines (default: text)")
    flag("--prompt-key", help="the key of a prompt before the text, for data.clean_prompts (default: none)")
    flag("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    flag(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document id",
    )
    flag("--valid-fraction", type=float, default=0.0, help="share of documents held out (default: 0)")
    flag("--min-tokens", type=int, default=1, help="skip documents with fewer tokens (default: 1)")
    flag(
        "--vocab-size",
        type=int,
        help="rows of the model's embedding, where it has more than the tokenizer has ids (default: its ids)",
    )
    flag("--overwrite", action="store_true", help="replace an existing dataset")
    arguments = vars(parser.parse_args())
    return PreprocessOptions(inputs=tuple(arguments.pop("input")), **arguments)


def run(options: PreprocessOptions) -> None:
    """Preprocesses under a progress bar and prints the report."""
    begin = time.perf_counter()
    total = sum(path.stat().st_size for path in find_inputs(options.inputs))
    # The bar counts bytes as stored, for their total is known; tqdm is silent where stderr is no terminal.
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:

        def show(report: Report) -> None:
            seconds = time.perf_counter() - begin
            megabytes, tokens = report.text_bytes / seconds / 1e6, report.tokens / seconds
            bar.set_postfix_str(f"text {megabytes:.1f} MB/s, {tokens:,.0f} tok/s", refresh=False)
            bar.update(report.disk_bytes - bar.n)

        report = preprocess(options, show)
    for prefix, made in report.manifests.items():
        print(
            f"{prefix}: {made.documents:,} documents, {made.tokens:,} tokens, "
            f"{made.bytes_per_token:.3f} bytes a token, {made.dtype}, {sum(made.sizes.values()):,} bytes"
        )
    seconds = time.perf_counter() - begin
    print(f"{report.text_bytes:,} bytes of text in {seconds:.1f} s, {report.tokens / seconds:,.0f} tokens/s")
    for line in report.skipped_lines():
        print(f"skipped {line}")


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop cleans up like Ctrl-C
    try:
        run(parse_arguments())
    except (DataError, OSError) as error:
        print(f"preprocess_data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("preprocess_data: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
