#!/usr/bin/env bash
# OPSD on Qwen3-1.7B with a teacher that follows the student as an exponential moving average. The first release had
# the option; its settings and results are not published.
#
#   bash scripts/run_opsd_ema.sh
#   CHECKPOINTS="outputs/opsd_ema/checkpoint-*" NUM_PROCESSES=4 bash eval/run_eval.sh
#
# Expected: not published. Compare with run_opsd_1b.sh. This project has not run it.
# With a decay of 0.999 the teacher is slow: after 100 steps the initial policy still has nine tenths of its weight.
#
# What is read from the environment, DRY_RUN=1, further arguments and all other settings: scripts/run_opsd_1b.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd_ema}

arguments=(
    --fixed_teacher false    # the two exclude each other
    --use_ema_teacher        # first release
    --ema_decay 0.999        # ours: not published (see above)
    --ema_update_steps 1     # ours: not published
    --run_name opsd_ema
)
exec bash scripts/run_opsd_1b.sh "${arguments[@]}" "$@"
