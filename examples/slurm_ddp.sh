#!/bin/bash
# Gradual pruning on several nodes under SLURM: one torchrun a node, one process a GPU.
# Submit with: sbatch examples/slurm_ddp.sh train.py
# The script given must build Trainer(strategy="ddp", num_nodes=$SLURM_NNODES, devices=8, ...); Lightning reads torchrun's
# variables and not SLURM's, because torchrun has started its process.
#SBATCH --job-name=cap
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=SIGTERM@90

set -euo pipefail

script=${1:?"give the training script"}
shift
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$first_node:29500" \
    "$script" "$@"
