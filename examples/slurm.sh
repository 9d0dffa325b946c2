#!/bin/bash
# Pre-training on SLURM, one torchrun per node: sbatch examples/slurm.sh
# With --resume the same script goes on in the next job, and after a job was preempted and requeued.
#SBATCH --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --requeue --time=24:00:00
#SBATCH --signal=TERM@180                 # three minutes before the end, to all processes of the job's steps
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes $SLURM_NNODES --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint $MASTER:29500 \
    -m audiomae pretrain --recipe audiomae_base.as2m --data /fast/audioset --workers 7 \
    --out /shared/runs/base --resume'
