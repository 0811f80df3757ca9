#!/usr/bin/env bash
# Print how many processes to start: NUM_PROCESSES, else one for each GPU that CUDA_VISIBLE_DEVICES names, else $1.
set -euo pipefail
if [ -z "${NUM_PROCESSES:-}" ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    NUM_PROCESSES=${#gpus[@]}
fi
echo "${NUM_PROCESSES:-${1:?set NUM_PROCESSES to the number of GPUs, or name them in CUDA_VISIBLE_DEVICES}}"
