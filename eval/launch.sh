#!/usr/bin/env bash
# Start an evaluation of the base model and the checkpoints of a run; eval/run_eval.sh and its sibling end here:
#
#   MODEL=Qwen/Qwen3-1.7B bash eval/launch.sh NAME [arguments]
#
# NAME is the first word of the output file. OUTPUT_DIR is the folder of the run; results are in OUTPUT_DIR/results.
# CHECKPOINTS (adapter folders or a pattern) are those of the run, unless named otherwise. Without both, the base model
# is evaluated alone, into outputs/base/results.
# MODEL, DATASET (one or more), SEED, and NUM_PROCESSES (engines, one for each GPU; without it those that
# CUDA_VISIBLE_DEVICES names, or 1). DRY_RUN=1 checks all arguments, prints the command and exits. Further arguments go
# through, the last one wins.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/activate.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # of this folder also where .venv is another clone's

name=${1:?name the evaluation: the first word of its output file}
shift
checkpoints=(${CHECKPOINTS:-${OUTPUT_DIR:+$OUTPUT_DIR/checkpoint-*}}) # unquoted, so that patterns are expanded
if [ -z "${OUTPUT_DIR:-}" ] && [ ${#checkpoints[@]} -gt 0 ]; then
    OUTPUT_DIR=${checkpoints[0]%/}
    [[ $(basename "$OUTPUT_DIR") != checkpoint-* ]] || OUTPUT_DIR=$(dirname "$OUTPUT_DIR")
fi

arguments=(
    --base_model "${MODEL:?name the base model}"
    --dataset ${DATASET:-aime24 aime25 hmmt25} # words; release, results
    --seed "${SEED:-0}"                        # the release has none
    --data_parallel "$(bash scripts/num_processes.sh 1)"
    --output_file "${OUTPUT_DIR:-outputs/base}/results/$name-$(basename "$MODEL").json"
)
if [ ${#checkpoints[@]} -gt 0 ]; then arguments+=(--checkpoint_dir "${checkpoints[@]}"); fi
if [ "${DRY_RUN:-0}" = 1 ]; then arguments+=(--dry_run); fi
exec python eval/evaluate_math.py "${arguments[@]}" "$@"
