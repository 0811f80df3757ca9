#!/usr/bin/env bash
# OPSD on Qwen3-4B with the settings of the release (March 18, 2026).
#
#   bash scripts/run_opsd_4b.sh
#   MODEL=Qwen/Qwen3-4B CHECKPOINTS="outputs/opsd_4b/checkpoint-*" NUM_PROCESSES=8 bash eval/run_eval.sh
#
# Expected (thinking mode, Avg@12; steps: the author in the release's issue 11). This project has not run it.
#              AIME24  AIME25  HMMT25
#   base         74.9    66.4    42.2
#   step  25     76.4    65.3    42.2
#   step  50     72.5    68.3    42.2
#   step  75     74.4    67.8    46.1
#   step 100     73.6    66.7    43.9
# Paper v3, Table 2, gives the best step of each column: 76.4 / 68.3 / 46.1. No time and no repeated run is published.
#
# What is read from the environment, DRY_RUN=1, further arguments and all other settings: scripts/run_opsd_1b.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export MODEL=${MODEL:-Qwen/Qwen3-4B} OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd_4b}
export NUM_PROCESSES=$(bash scripts/num_processes.sh 8)

# release: 4 sequences on each of 8 GPUs, the clip of 1.7B; paper v3, Table 2: checkpoints within 100 steps
exec bash scripts/run_opsd_1b.sh --run_name opsd_4b "$@"
