#!/usr/bin/env bash
# Train on any number of SLURM nodes. From the project's folder, on a file system that all nodes see:
#
#   MODEL=Qwen/Qwen3-8B OUTPUT_DIR=outputs/opsd_8b sbatch --nodes 4 scripts/train_multi_node.sh --max_steps 200
#
# Before the time limit SLURM sends SIGTERM, and the run saves and stops; the same command submitted again goes on from
# there. Further arguments go to opsd_train.py, the last one wins. DRY_RUN=1 prints what each node runs.
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
source .venv/bin/activate

MODEL=${MODEL:-Qwen/Qwen3-8B}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd_$(basename "$MODEL")}
CONFIG=${CONFIG:-scripts/accelerate/multi_node.yaml}
NUM_NODES=${SLURM_JOB_NUM_NODES:-2}
NUM_PROCESSES=${NUM_PROCESSES:-$((NUM_NODES * ${SLURM_GPUS_ON_NODE:-8}))} # on all nodes together
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
PORT=${PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}

arguments=(
    --model_name_or_path "$MODEL"
    --output_dir "$OUTPUT_DIR"
    --dataset_name siyanzhao/Openthoughts_math_30k_opsd
    --dtype bfloat16
    --fixed_teacher
    --use_peft
    --lora_r 64
    --lora_alpha 128
    --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
    --use_vllm true
    --per_device_train_batch_size 2 # x 16 GPUs: the release's 32 prompts a step
    --gradient_accumulation_steps 1
    --max_steps 100
    --save_steps 25
    --logging_steps 2
)
if compgen -G "$OUTPUT_DIR/checkpoint-*" >/dev/null; then arguments+=(--resume_from_checkpoint true); fi

# The rendezvous has to be named here: accelerate does not read it from its configuration.
command=(
    srun --kill-on-bad-exit=1
    accelerate launch
    --config_file "$CONFIG"
    --num_machines "$NUM_NODES"
    --num_processes "$NUM_PROCESSES"
    --rdzv_backend c10d
    --main_process_ip "${HEAD_NODE:-HEAD_NODE}"
    --main_process_port "$PORT"
    opsd_train.py "${arguments[@]}" "$@"
)
printf '%q ' "${command[@]}" && echo
[ "${DRY_RUN:-0}" != 1 ] || exit 0

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=570 # seconds that the launcher gives the run to save, in place of 30
exec "${command[@]}"
