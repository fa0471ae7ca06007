#!/usr/bin/env bash
# The plays of Shakespeare in 384 pieces, which the ladder and the study train on; nothing where they are there.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=examples/data/shakespeare.jsonl.xz
[ -f data/shakespeare_384.model ] || python tools/train_tokenizer.py --input "$corpus" --vocab-size 384 --output data/shakespeare_384.model
[ -f data/shakespeare_384_valid.json ] || python tools/preprocess_data.py --input "$corpus" --tokenizer data/shakespeare_384.model \
  --output data/shakespeare_384 --valid-fraction 0.05 --overwrite
