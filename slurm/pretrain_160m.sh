#!/bin/bash
# Trains examples/xdlm_160m.yaml:   sbatch slurm/pretrain_160m.sh [section.field=value ...]
# Options of sbatch go before the script: sbatch --nodes=8 --time=2-0 --partition=gpu slurm/pretrain_160m.sh
#SBATCH --job-name=xdlm-160m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${XDLM_HOME:-$SLURM_SUBMIT_DIR}"
exec slurm/run_recipe.sh examples/xdlm_160m.yaml "$@"
