#!/usr/bin/env bash
# On-policy distillation, the baseline with a larger teacher: Qwen3-8B teaches Qwen3-1.7B. Both have the same prompt,
# with the problem only. Table 1 of paper v1 sets the method beside it, and no version publishes scores of it.
#
#   bash scripts/run_opd_1b.sh
#   CHECKPOINTS="outputs/opd_1b/checkpoint-*" NUM_PROCESSES=4 bash eval/run_eval.sh
#
# Expected: nothing is published for these settings, and this project has not run it. Compare with run_opsd_1b.sh.
# Each GPU holds the teacher too, 16.4 GB in bfloat16; with ACCELERATE_CONFIG=scripts/accelerate/zero3.yaml its share.
# TEACHER names another model with the student's tokenizer.
#
# What is read from the environment, DRY_RUN=1, further arguments and all other settings: scripts/run_opsd_1b.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/opd_1b}

arguments=(
    --teacher_model_name_or_path "${TEACHER:-Qwen/Qwen3-8B}" # ours: a larger model of the family
    --fixed_teacher false                                    # the two exclude each other
    --teacher_context none                                   # on-policy distillation: no solution
    --vllm_gpu_memory_utilization 0.4                        # ours: leaves room for the teacher
    --run_name opd_1b
)
exec bash scripts/run_opsd_1b.sh "${arguments[@]}" "$@"
