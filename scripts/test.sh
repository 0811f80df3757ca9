#!/usr/bin/env bash
# Set up what is missing, then lint and test. Arguments go to pytest: bash scripts/test.sh tests/test_opsd_loss.py -k clip
# Without any, all tests run in two processes, file by file. -m "not vllm and not multiprocess" takes a minute or two.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
source .venv/bin/activate

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TRL_EXPERIMENTAL_SILENCE=1
ruff check .
ruff format --check .
for script in scripts/*.sh eval/*.sh .ci/run; do [ ! -e "$script" ] || bash -n "$script"; done
# Two engines would not fit a GPU
[ $# -gt 0 ] || nvidia-smi >/dev/null 2>&1 || set -- -n 2 --dist loadfile
exec python -m pytest "$@"
