#!/usr/bin/env bash
# OPSD on Qwen3-1.7B with the divergence over the teacher's k most probable entries only, renormalized. The first
# release had the option; its settings and results are not published.
#
#   bash scripts/run_opsd_topkloss.sh
#   CHECKPOINTS="outputs/opsd_topkloss/checkpoint-*" NUM_PROCESSES=4 bash eval/run_eval.sh
#
# Expected: not published. Compare with run_opsd_1b.sh. This project has not run it.
#
# What is read from the environment, DRY_RUN=1, further arguments and all other settings: scripts/run_opsd_1b.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd_topkloss}

# ours: the release publishes no k
exec bash scripts/run_opsd_1b.sh --top_k_loss 100 --run_name opsd_topkloss "$@"
