#!/usr/bin/env bash
# The release's evaluation of OPSD without thinking, on Qwen3-8B: Avg@12 on AIME 2024, AIME 2025 and HMMT February
# 2025.
#
#   CHECKPOINTS="outputs/opsd_8b_nonthink/checkpoint-50" NUM_PROCESSES=4 bash eval/run_eval_nonthink.sh
#
# Expected (release's results, non-thinking, March 18, 2026; MODEL=Qwen/Qwen3-4B for the other model):
#                  AIME24  AIME25  HMMT25
#   8B  base         26.4    19.7    10.8
#   8B  step  50     49.7    35.0    18.3
#   4B  base         23.1    21.4    10.8
#   4B  step 150     32.8    21.9    14.4
#
# OUTPUT_DIR, CHECKPOINTS, MODEL, DATASET, SEED, NUM_PROCESSES and DRY_RUN=1: see eval/launch.sh. Further arguments go
# through, the last one wins.
set -euo pipefail
cd "$(dirname "$0")/.."

export MODEL=${MODEL:-Qwen/Qwen3-8B}
arguments=(
    --enable_thinking false            # release, non-thinking results
    --val_n 12                         # release, non-thinking results: Avg@12
    --temperature 1.0                  # the rest: release, evaluation settings, reported for thinking mode
    --top_p 1.0                        # none (its code has 0.95)
    --top_k 0                          # disabled
    --min_p 0
    --presence_penalty 0
    --max_new_tokens 38912
)
exec bash eval/launch.sh nonthink "${arguments[@]}" "$@"
