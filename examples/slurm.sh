#!/usr/bin/env bash
# Pretraining under SLURM, over as many jobs as it takes: before its time is over, a job saves and queues itself again.
#
#   sbatch slurm.sh --config llama1b.yaml --config strategy/hsdp.yaml
#
#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# SIGTERM to the processes of the run (not to this script), 120 seconds before the end: a step and a checkpoint have to
# fit in there. SIGUSR1, which Lightning's own requeueing waits for, would save nothing here.
#SBATCH --signal=TERM@120
set -euo pipefail

status=0
# One task for each GPU, as the trainer is told; run.root has to be on a file system that all machines see.
srun --kill-on-bad-exit=1 python -m lightning_multinorm fit "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --ckpt_path last || status=$?

if [ "$status" -eq 143 ]; then  # asked to end, and saved
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
