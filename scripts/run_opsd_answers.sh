#!/usr/bin/env bash
# Group self-distillation on Qwen3-1.7B: OPSD from answers alone. Four rollouts of each problem are graded. In place of
# a reference solution the teacher sees one of the other rollouts that is right. This goes beyond the paper.
#
#   bash scripts/run_opsd_answers.sh
#   CHECKPOINTS="outputs/opsd_answers/checkpoint-*" NUM_PROCESSES=4 bash eval/run_eval.sh
#
# Expected: nothing is published, and this project has not run it. Compare with run_opsd_1b.sh and run_grpo.sh.
# Metrics to watch: rewards/accuracy/mean; references/none_ratio (rollouts sampled in vain, because no other one is
# right); completions/clipped_ratio (a rollout that is cut off is never right, and 1,024 tokens are few for a hard
# problem).
#
# What is read from the environment, DRY_RUN=1, further arguments and all other settings: scripts/run_opsd_1b.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd_answers}

arguments=(
    --answer_column Answer          # as GRPO in the release; no solutions are read
    --teacher_context rollout       # ours
    --reference_fallback skip       # ours; "answer" shows the teacher the right answer there
    --num_generations 4             # ours: 8 problems a step; more rollouts find a right one more often
    --run_name opsd_answers
)
exec bash scripts/run_opsd_1b.sh "${arguments[@]}" "$@"
