#!/usr/bin/env bash
# From bundled text to a trained, evaluated and sampled XDLM on two CPU cores. Run by `make quickstart`; run it
# again and it goes on from where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # two processes on the CPU, whatever GPUs there are
recipe=examples/quickstart.yaml
run=runs/quickstart
corpus=examples/data/shakespeare.jsonl.xz

say() { printf '\n== %s\n' "$*"; }

say "tokenizer and data"
(cd examples/data && sha256sum --check --ignore-missing --quiet shakespeare.sha256) ||
  { echo "error: $corpus does not have its checksum; check it out again" >&2; exit 2; }
[ -f data/shakespeare.model ] || python tools/train_tokenizer.py --input "$corpus" --vocab-size 2048 --output data/shakespeare.model
[ -f data/shakespeare_valid.json ] || python tools/preprocess_data.py --input "$corpus" --tokenizer data/shakespeare.model \
  --output data/shakespeare --valid-fraction 0.05 --overwrite

say "training on two processes, tensor parallel"
resume=()
if [ -f "$run/checkpoints/latest" ]; then resume=(--resume); else rm -rf "$run"; fi
torchrun --standalone --nproc-per-node 2 -m xdlm_megatron train "$recipe" "${resume[@]}"

say "evaluation"
python -m xdlm_megatron evaluate "$recipe" parallel.tensor_model_parallel_size=1

say "a sample, and how it came about"
python -m xdlm_megatron sample "$recipe" parallel.tensor_model_parallel_size=1 --steps 64 --trace 6

say "loss curve"
evaluation="$run/evaluations/$(cat "$run/checkpoints/latest")-ema.json"
entropy=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['unigram_entropy'])" "$evaluation")
python tools/plot_run.py "$run" --reference "unigram entropy of the text=$entropy"

say "done"
echo "run folder   $run (recipe, metrics.jsonl, checkpoints, figures/loss.png)"
echo "MLflow runs  sqlite:///$PWD/runs/mlflow.db; look at them with: make ui"
