#!/usr/bin/env bash
# Pretraining on one machine or several without a scheduler: start this on each machine, with the same options.
#
#   NNODES=2 MASTER_ADDR=first-machine ./torchrun.sh --config llama1b.yaml --config strategy/fsdp2.yaml
#
# NNODES           machines (default: 1)
# DEVICES          processes on each of them, one for each GPU (default: the GPUs of this one)
# MASTER_ADDR      the first machine, by a name that the others know (default: this one)
# MASTER_PORT      a free port of it (default: 29500)
# The same line goes on from the newest whole checkpoint, after whatever ended the run before. SIGTERM to torchrun ends
# a run after the step it is in, with a checkpoint; run.root has to be on a file system that all machines see.
set -euo pipefail

machines=${NNODES:-1}
devices=${DEVICES:-$(nvidia-smi --list-gpus | wc -l)}
# torchrun would kill its processes 30 seconds after SIGTERM, perhaps in the middle of a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

exec torchrun \
  --nnodes "$machines" \
  --nproc_per_node "$devices" \
  --rdzv_backend c10d \
  --rdzv_endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}" \
  -m lightning_multinorm fit "$@" \
  --trainer.num_nodes "$machines" \
  --trainer.devices "$devices" \
  --ckpt_path last
