#!/bin/bash
# The body of every slurm/pretrain_*.sh: trains a recipe inside a Slurm job, saves before the time limit and
# goes on in the same run folder and the same MLflow run when Slurm starts the job again.
#
#   slurm/run_recipe.sh RECIPE [section.field=value ...]
#
# Environment, all of it optional; interpreter and container are chosen in processes.sh:
#   XDLM_CHECK         1: collectives between all processes first (slurm/nccl_check.sh); default: on several nodes
#   XDLM_MAX_RESTARTS  requeues of one job before it gives up (default 100)
#
# Exit status: 0 finished or stopped as asked, 1 failed, 2 the recipe or the data, else Slurm's.
set -euo pipefail

say() { echo "run_recipe: $*"; }
fail() { # STATUS MESSAGE...
    echo "run_recipe: error: ${*:2}" >&2
    exit "$1"
}

(($# >= 1)) || fail 2 "no recipe; call it as slurm/run_recipe.sh RECIPE [section.field=value ...]"
[[ -n ${SLURM_JOB_ID:-} ]] || fail 2 "this is no Slurm job; start it by sbatch, or train by torchrun"
# shellcheck source=slurm/processes.sh
source "${BASH_SOURCE[0]%/*}/processes.sh"
restart=${SLURM_RESTART_COUNT:-0}

# The time limit (sbatch --signal=B:USR1@SECONDS) and `scancel --batch --signal=USR1 JOB` reach this shell, which
# passes them on: the processes save and end.
asked="" training=""
# shellcheck disable=SC2317,SC2329  # the trap calls it
ask() {
    asked=yes
    say "asked to save and be requeued"
    [[ -z $training ]] || kill -USR1 "$training" 2>/dev/null || true
}
trap ask USR1

# The recipe first: a mistake in it must not cost the start of a thousand processes. One task of the job reads it,
# in the container if there is one.
folder=$("${srun[@]/--label/--quiet}" --nodes=1 --ntasks=1 "${in_container[@]}" "$python" -c '
import sys
from xdlm_megatron.config.derive import derive, run_folder
from xdlm_megatron.config.load import load_recipe
try:
    config = load_recipe(sys.argv[2], sys.argv[3:])
    derive(config, int(sys.argv[1]))
except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
print(run_folder(config))
' "$SLURM_NTASKS" "$@") || fail $(($? == 2 ? 2 : 1)) "$1 cannot run on $SLURM_NTASKS processes, see above"

# A run folder that exists is this run's: whoever submits again, or Slurm after a requeue, goes on. Another recipe
# in the same folder is refused by --resume itself.
resume=()
[[ -e $folder/recipe.yaml ]] && resume=(--resume)
say "job $SLURM_JOB_ID, start $((restart + 1)), $SLURM_NTASKS processes on $SLURM_JOB_NODELIST, run folder $folder"
((restart == 0)) || [[ -n ${resume[*]} ]] ||
    say "$folder holds no run yet: it begins at step 0 (is the folder on a disk that every node sees?)"

# Requeues, but not for ever where nothing comes of it: a fault that returns at every start, a limit too short.
newest() { cat "$folder/checkpoints/latest" 2>/dev/null || echo none; }
began_at=$(newest)
requeue() { # REASON
    ((restart < ${XDLM_MAX_RESTARTS:-100})) || fail 1 "restarted $restart times (XDLM_MAX_RESTARTS); look why: $1"
    if [[ $(newest) == "$began_at" ]]; then
        mkdir -p "$folder"
        echo "job $SLURM_JOB_ID, start $((restart + 1)): $1" >>"$folder/vain_starts"
        (($(wc -l <"$folder/vain_starts") < 3)) ||
            fail 1 "the third start in a row that saved nothing (they are in $folder/vain_starts): $1"
    else
        rm -f "$folder/vain_starts"
    fi
    say "$1; requeues"
    exec scontrol requeue "$SLURM_JOB_ID"
}

if [[ ${XDLM_CHECK:-$((SLURM_JOB_NUM_NODES > 1))} == 1 ]]; then
    status=0
    "${srun[@]}" "${in_container[@]}" "${as_rank[@]}" "$python" tools/check_collectives.py || status=$?
    ((status != 137)) || requeue "the check of the links was killed (srun: $status)" # as by a node that is gone
    ((status == 0)) ||
        fail 1 "the processes do not reach each other, see above; exclude the node it names: sbatch --exclude=NODE"
fi
[[ -z $asked ]] || requeue "asked before training began"

rm -f "$folder/outcome" # an earlier start's
trap 'say "asked to stop"' TERM # Slurm has told the processes itself
"${srun[@]}" "${in_container[@]}" "${as_rank[@]}" "$python" -m xdlm_megatron train "$@" "${resume[@]}" &
training=$!
status=0
while true; do # a signal ends a wait, not the training
    wait "$training" && status=0 || status=$?
    kill -0 "$training" 2>/dev/null || break
done

outcome=""
[[ -s $folder/outcome ]] && outcome=$(head -n 1 "$folder/outcome")
case $outcome in
    finished* | stopped*)
        rm -f "$folder/vain_starts"
        say "$outcome"
        exit 0
        ;;
    requeue* | lost*) requeue "$outcome" ;; # lost: a process or its node is gone
    failed*) fail $((status == 2 ? 2 : 1)) "$outcome" ;;
esac
# No word: the signal came before training could answer it, or the system ended the processes (SIGKILL; SIGABRT
# is NCCL's when a node is gone).
[[ -z $asked ]] || requeue "asked before training could answer"
((status != 75)) || requeue "a process or its node was lost before training began (srun: 75)"
((status <= 128)) || requeue "the processes were killed (srun: $status)"
fail "$((status ? status : 1))" "training ended without a word (srun: $status); look for its last lines above"
