#!/bin/bash
# Do all processes of a job reach each other, and how fast?   sbatch --nodes=4 slurm/nccl_check.sh
# slurm/run_recipe.sh runs the same check before it trains on several nodes.
#SBATCH --job-name=xdlm-check
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=10
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${XDLM_HOME:-$SLURM_SUBMIT_DIR}"
python=${XDLM_PYTHON:-$PWD/.venv/bin/python}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID * 7 % 10000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS
# shellcheck disable=SC2016  # for the task's shell, which knows its place
exec srun --label --wait=120 bash -c \
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' rank "$python" tools/check_collectives.py "$@"
