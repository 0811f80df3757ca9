#!/usr/bin/env bash
# OPSD on Qwen3-4B without thinking, for student, teacher and evaluation: the release's non-thinking variant.
#
#   bash scripts/run_opsd_4b_nonthink.sh
#   MODEL=Qwen/Qwen3-4B CHECKPOINTS="outputs/opsd_4b_nonthink/checkpoint-150" NUM_PROCESSES=8 \
#       bash eval/run_eval_nonthink.sh
#
# Expected (without thinking, Avg@12; no time given). This project has not run it.
#                                                 AIME24  AIME25  HMMT25
#   release           base                          23.1    21.4    10.8
#                     step 150                      32.8    21.9    14.4
#   a reproduction    base                          23.2    21.1    11.7
#                     trained, step not known here  30.8    23.1    15.4
# MODEL=Qwen/Qwen3-1.7B takes the same clip in the release; its scores are not published.
#
# What is read from the environment, DRY_RUN=1, further arguments and all other settings: scripts/run_opsd_1b.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export MODEL=${MODEL:-Qwen/Qwen3-4B} NUM_PROCESSES=$(bash scripts/num_processes.sh 8)
export EVALUATION=${EVALUATION:-eval/run_eval_nonthink.sh} # of SEEDS
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd_4b_nonthink}

arguments=(
    --teacher_thinking false   # release, non-thinking variant; the student does not think in any variant
    --jsd_token_clip 1e-6      # release, non-thinking variant of 1.7B and 4B
    --max_steps 150            # release: the result is at step 150
    --run_name opsd_4b_nonthink
)
exec bash scripts/run_opsd_1b.sh "${arguments[@]}" "$@"
