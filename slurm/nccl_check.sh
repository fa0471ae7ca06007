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
# shellcheck source=slurm/processes.sh
source slurm/processes.sh
exec "${srun[@]}" "${in_container[@]}" "${as_rank[@]}" "$python" tools/check_collectives.py "$@"
