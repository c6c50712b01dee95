#!/usr/bin/env bash
# sbatch examples/slurm.sh: four nodes of eight GPUs. A preempted or killed job is requeued and resumes.
#SBATCH --job-name=sft
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=runs/slurm-%j.log
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# exec: the signal two minutes before the end reaches torchrun, and its ranks save and exit.
exec srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
    -m trainer.main examples/several_nodes.toml "$@"
