#!/bin/bash
# Masks of photographs by SLURM: a task for each GPU, each with its share of the photographs. docs/jobs.md tells more.
#
#   RUN=/shared/run PHOTOS=/shared/photos MASKS=/shared/masks sbatch deploy/slurm_predict.sh
#
# LCRF is the command, by default `lcrf`; in a container for example LCRF="apptainer run --nv lcrf_jax.sif". Further arguments are
# those of `lcrf predict`. Submitted again, it makes the masks that are missing.
#SBATCH --job-name=lcrf-predict
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${RUN:?the folder of the run}" "${PHOTOS:?the folder of the photographs}" "${MASKS:?the folder for the masks}"
export LCRF="${LCRF:-lcrf}" RUN PHOTOS MASKS LCRF_JAX_PROGRESS="${LCRF_JAX_PROGRESS:-lines}"

code=0
# shellcheck disable=SC2016 # each task has numbers of its own
srun --kill-on-bad-exit=0 bash -c '
  exec $LCRF predict --checkpoint="$RUN" --images="$PHOTOS" --out="$MASKS" --crf \
    --num_processes="$SLURM_NTASKS" --process_id="$SLURM_PROCID" "$@"
' lcrf-predict "$@" || code=$?
if [ "$code" -eq 143 ]; then # the time was over, and SLURM has said so
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
