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
# MODEL, CHECKPOINTS (adapter folders or a pattern; none: the base model alone), OUTPUT_DIR, NUM_PROCESSES (engines,
# one for each GPU). DRY_RUN=1 checks all arguments, prints the command and exits. Further arguments go through, the
# last one wins.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/activate.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # of this folder also where .venv is another clone's

model=${MODEL:-Qwen/Qwen3-8B}
checkpoints=(${CHECKPOINTS:-}) # unquoted, so that patterns are expanded

arguments=(
    --base_model "$model"
    --dataset aime24 aime25 hmmt25     # release, results
    --no_thinking                      # release, non-thinking results
    --val_n 12                         # release, non-thinking results: Avg@12
    --temperature 1.0                  # the rest: release, evaluation settings, reported for thinking mode
    --top_p 1.0                        # none (its code has 0.95)
    --top_k 0                          # disabled
    --min_p 0
    --presence_penalty 0
    --max_new_tokens 38912
    --seed 0                           # the release has none
    --data_parallel "${NUM_PROCESSES:-1}"
    --output_file "${OUTPUT_DIR:-outputs/eval}/nonthink-$(basename "$model").json"
)
if [ ${#checkpoints[@]} -gt 0 ]; then arguments+=(--checkpoint_dir "${checkpoints[@]}"); fi
if [ "${DRY_RUN:-0}" = 1 ]; then arguments+=(--dry_run); fi
exec python eval/evaluate_math.py "${arguments[@]}" "$@"
