#!/bin/bash
# Trains examples/llada_8b_cpt.yaml:   sbatch slurm/pretrain_llada_8b_cpt.sh [section.field=value ...]
# Options of sbatch go before the script: sbatch --nodes=4 --time=1-0 --partition=gpu slurm/pretrain_llada_8b_cpt.sh
#SBATCH --job-name=llada-8b-cpt
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
exec slurm/run_recipe.sh examples/llada_8b_cpt.yaml "$@"
