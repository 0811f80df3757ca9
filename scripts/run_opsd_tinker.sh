#!/usr/bin/env bash
# The sampled-token objective on Qwen3-4B: paper eq. 9, a policy gradient with the detached log-ratio as its advantage.
# It is the second row of Table 3 of paper v1; the full vocabulary of scripts/run_opsd_paper_v1.sh is the first row.
#
#   bash scripts/run_opsd_tinker.sh
#   MODEL=Qwen/Qwen3-4B CHECKPOINTS="outputs/opsd_tinker/checkpoint-*" NUM_PROCESSES=8 bash eval/run_eval.sh \
#       --dataset aime25 hmmt25 --val_n 16 --temperature 1.2 --top_p 0.95
#
# Expected (paper v1, Table 3, and again v3, Table 4; pass@8; no time given). This project has not run it.
#                      AIME25  HMMT25
#   full vocabulary      84.1    60.0
#   sampled token        82.1    57.3
# With the settings of the release instead: bash scripts/run_opsd_1b.sh --use_tinker_loss. It has no clip and may be
# unstable.
#
# What is read from the environment, DRY_RUN=1, further arguments and all other settings: scripts/run_opsd_paper_v1.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd_tinker}

# paper v1, section 4.3.3; --beta 0.5 then counts for the logged divergence only
exec bash scripts/run_opsd_paper_v1.sh --use_tinker_loss --run_name opsd_tinker "$@"
