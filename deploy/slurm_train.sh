#!/bin/bash
# Training by SLURM, over all GPUs of all nodes. docs/jobs.md tells more.
#
#   RUN=/shared/run sbatch deploy/slurm_train.sh --config=folder --config.data.root=/shared/photos
#
# LCRF is the command, by default `lcrf`; in a container for example LCRF="apptainer run --nv lcrf_jax.sif". The arguments are those
# of `lcrf train`. Two minutes before its time is over the run saves its state and is queued again; it goes on to the same bits.
#SBATCH --job-name=lcrf-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${RUN:?the folder for the run}"
export LCRF_JAX_PROGRESS="${LCRF_JAX_PROGRESS:-lines}"

code=0
# shellcheck disable=SC2086 # a command of several words
srun --kill-on-bad-exit=1 ${LCRF:-lcrf} train --distributed --workdir="$RUN" "$@" || code=$?
if [ "$code" -eq 143 ]; then # the time was over, and SLURM has said so
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
