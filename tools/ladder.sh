#!/usr/bin/env bash
# A real ladder on two CPU cores: many small runs on the plays of Shakespeare, their scaling law, a report, and all
# of it in MLflow. Run by `make ladder`; run it again and it goes on from where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # on the CPU, whatever GPUs there are
sweep=examples/ladder_laptop.yaml
runs=runs/ladder_laptop
results=benchmarks/results/ladder
store="sqlite:///$PWD/runs/mlflow.db"

say() { printf '\n== %s\n' "$*"; }

say "tokenizer and data"
bash tools/shakespeare_384.sh

say "runs, two at a time"
python -m xdlm_megatron sweep "$sweep" --local 2
mkdir -p "$results"
python -m xdlm_megatron sweep "$sweep" --table "$results/points.csv"

say "MLflow: a parent run, and each run its child"
python tools/sync_mlflow.py "$runs" --to "$store"

say "the law"
python -m xdlm_megatron fit "$runs" --output "$results"
rm -f "$results"/*.svg # they are in report.html

say "done"
echo "results      $results (points.csv, fit.json, report.html, figures)"
echo "MLflow runs  $store; look at them with: make ui"
