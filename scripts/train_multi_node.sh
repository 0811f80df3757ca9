#!/usr/bin/env bash
# Train on any number of SLURM nodes, with a recipe or a program. Run it in the project's folder, on a file system that
# all nodes see:
#
#   OUTPUT_DIR=outputs/opsd_8b sbatch --nodes 2 scripts/train_multi_node.sh scripts/run_opsd_8b.sh [arguments]
#   OUTPUT_DIR=outputs/mine sbatch scripts/train_multi_node.sh opsd_train.py --config my_settings.yaml
#
# The batch stays the recipe's. The program refuses if processes x --per_device_train_batch_size is more than
# --effective_batch_size; give one of the two anew (4 nodes of 8 GPUs: --per_device_train_batch_size 1).
#
# Before the time limit SLURM sends SIGTERM, and the run saves and stops. The same command, submitted again, resumes
# it. Read from the environment: MODEL, DATASET, SEED (by recipes), PORT, ACCELERATE_CONFIG, and NUM_PROCESSES (on all
# nodes together) if not every GPU shall have one. Further arguments go to the program, the last one wins. DRY_RUN=1
# prints the command of the first node and checks it.
#
# SEEDS="0 1 2" sbatch --array 0-2 ... trains each seed in a job of its own, into OUTPUT_DIR/seed_S. When all are done,
# SEEDS="0 1 2" with the recipe itself evaluates them and makes the table: see scripts/seeds.sh.
#
#SBATCH --job-name=opsd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

what=${1:?name a recipe or a program: scripts/run_opsd_8b.sh, opsd_train.py}
shift
export OUTPUT_DIR=${OUTPUT_DIR:?name the output folder, which the next job goes on from}
if [ -n "${SEEDS:-}" ]; then
    seeds=($SEEDS)
    number=${SLURM_ARRAY_TASK_ID:?SEEDS needs a job for each seed: say sbatch --array 0-$((${#seeds[@]} - 1))}
    seed=${seeds[number]:?SEEDS has no seed for this task of the array}
    OUTPUT_DIR=$OUTPUT_DIR/seed_$seed
    set -- "$@" --seed "$seed"
    unset SEEDS
fi
export ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-scripts/accelerate/multi_node.yaml}
export NUM_MACHINES=${SLURM_JOB_NUM_NODES:-2}
export NUM_PROCESSES=${NUM_PROCESSES:-$((NUM_MACHINES * ${SLURM_GPUS_ON_NODE:-8}))}
MAIN_PROCESS_IP=HEAD_NODE # outside of a job, for DRY_RUN=1
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
export MAIN_PROCESS_IP
export MAIN_PROCESS_PORT=${PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=570 # seconds that the launcher gives the run to save, in place of 30

case $what in
*.sh) command=(bash "$what") ;;
*) command=(bash scripts/launch.sh "$what" --output_dir "$OUTPUT_DIR") ;;
esac
if compgen -G "$OUTPUT_DIR/checkpoint-*/checkpoint_files.json" >/dev/null; then # written last: a complete one
    command+=(--resume_from_checkpoint true)
elif compgen -G "$OUTPUT_DIR/checkpoint-*" >/dev/null; then # torn before the first was complete
    command+=(--overwrite_output_dir)
fi
[ "${DRY_RUN:-0}" != 1 ] || exec "${command[@]}" "$@"
# on each node; scripts/launch.sh reads its number from SLURM_NODEID
exec srun --kill-on-bad-exit=1 "${command[@]}" "$@"
