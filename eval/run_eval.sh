#!/usr/bin/env bash
# The release's evaluation of OPSD on Qwen3-1.7B, in thinking mode: Avg@12 on AIME 2024, AIME 2025 and HMMT February
# 2025.
#
#   CHECKPOINTS="outputs/opsd_1b/checkpoint-*" NUM_PROCESSES=4 bash eval/run_eval.sh
#
# Expected (release, March 18, 2026; its 30 to 50 minutes for each checkpoint on 4 x H100 are not measured here; for 4B
# and 8B see scripts/run_opsd_4b.sh and run_opsd_8b.sh):
#              AIME24  AIME25  HMMT25
#   base         51.5    36.7    23.1
#   step  25     51.4    42.5    24.7
#   step  50     52.8    43.9    27.8
#   step  75     54.4    40.6    26.9
#   step 100     57.2    41.1    29.2
#
# OUTPUT_DIR, CHECKPOINTS, MODEL, DATASET, SEED, NUM_PROCESSES and DRY_RUN=1: see eval/launch.sh. Further arguments go
# through, the last one wins.
set -euo pipefail
cd "$(dirname "$0")/.."

export MODEL=${MODEL:-Qwen/Qwen3-1.7B}
arguments=(
    --val_n 12                         # release, evaluation settings: num samples 12
    --temperature 1.0                  # release, evaluation settings
    --top_p 1.0                        # release, evaluation settings: none (its code has 0.95)
    --top_k 0                          # release, evaluation settings: disabled
    --min_p 0                          # release, evaluation settings
    --presence_penalty 0               # release, evaluation settings
    --max_new_tokens 38912             # release, evaluation settings
    --enable_thinking                  # release, evaluation settings
)
exec bash eval/launch.sh thinking "${arguments[@]}" "$@"
