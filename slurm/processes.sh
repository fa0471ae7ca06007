#!/bin/bash
# Sourced by the scripts here, inside a Slurm job: how its processes are started, and how they find each other.
#
#   "${srun[@]}" "${in_container[@]}" "${as_rank[@]}" "$python" PROGRAM
#
# One task is one process (on GPUs: one GPU). Environment, all of it optional:
#   XDLM_PYTHON        interpreter (default: .venv/bin/python where it exists and no container, else python3)
#   XDLM_CONTAINER     image: a .sif runs by apptainer, anything else by pyxis (srun --container-image)
#   XDLM_MOUNTS        what the container sees beside this folder, SOURCE:TARGET[,...]
# shellcheck disable=SC2034  # for those who source it
python=${XDLM_PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x .venv/bin/python && -z ${XDLM_CONTAINER:-} ]] && python=$PWD/.venv/bin/python
fi

in_container=()
srun=(srun --label --wait=300 --kill-on-bad-exit=0)
case ${XDLM_CONTAINER:-} in
    "") ;;
    *.sif) in_container=(apptainer exec --nv --bind "$PWD${XDLM_MOUNTS:+,$XDLM_MOUNTS}" "$XDLM_CONTAINER") ;;
    *)
        srun+=(--container-image="$XDLM_CONTAINER" --container-workdir="$PWD" --no-container-mount-home)
        srun+=(--container-mounts="$PWD:$PWD${XDLM_MOUNTS:+,$XDLM_MOUNTS}")
        ;;
esac

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Another port each start: what the one before left may linger.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS
[[ ${SLURM_TASKS_PER_NODE:-,} == *,* ]] || export LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%(*} # as 8(x4)
# shellcheck disable=SC2016  # for the task's shell, which knows its place
as_rank=(bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' rank)
