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
# OUTPUT_DIR is the folder of the run; results are in OUTPUT_DIR/results. CHECKPOINTS (adapter folders or a pattern)
# are those of the run, unless others are named. Without both, the base model is evaluated alone, into
# outputs/base/results.
# MODEL, DATASET (one or more), SEED, and NUM_PROCESSES (engines, one for each GPU; without it those that
# CUDA_VISIBLE_DEVICES names, or 1). DRY_RUN=1 checks all arguments, prints the command and exits. Further arguments go
# through, the last one wins.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/activate.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # of this folder also where .venv is another clone's

MODEL=${MODEL:-Qwen/Qwen3-8B}
DATASET=${DATASET:-aime24 aime25 hmmt25} # release, results
checkpoints=(${CHECKPOINTS:-${OUTPUT_DIR:+$OUTPUT_DIR/checkpoint-*}}) # unquoted, so that patterns are expanded
if [ -z "${OUTPUT_DIR:-}" ] && [ ${#checkpoints[@]} -gt 0 ]; then
    OUTPUT_DIR=${checkpoints[0]%/}
    [[ $(basename "$OUTPUT_DIR") != checkpoint-* ]] || OUTPUT_DIR=$(dirname "$OUTPUT_DIR")
fi

arguments=(
    --base_model "$MODEL"
    --dataset $DATASET                 # words
    --enable_thinking false            # release, non-thinking results
    --val_n 12                         # release, non-thinking results: Avg@12
    --temperature 1.0                  # the rest: release, evaluation settings, reported for thinking mode
    --top_p 1.0                        # none (its code has 0.95)
    --top_k 0                          # disabled
    --min_p 0
    --presence_penalty 0
    --max_new_tokens 38912
    --seed "${SEED:-0}"                # the release has none
    --data_parallel "$(bash scripts/num_processes.sh 1)"
    --output_file "${OUTPUT_DIR:-outputs/base}/results/nonthink-$(basename "$MODEL").json"
)
if [ ${#checkpoints[@]} -gt 0 ]; then arguments+=(--checkpoint_dir "${checkpoints[@]}"); fi
if [ "${DRY_RUN:-0}" = 1 ]; then arguments+=(--dry_run); fi
exec python eval/evaluate_math.py "${arguments[@]}" "$@"
