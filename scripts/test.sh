#!/usr/bin/env bash
# Set up the environment if necessary, lint, check types, and test. Arguments go to pytest:
#
#   bash scripts/test.sh tests/test_losses_divergence.py -k clip
#
# Without arguments all tests run, in two processes. -m "not vllm and not multiprocess" is the quick loop.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
source .venv/bin/activate

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TRL_EXPERIMENTAL_SILENCE=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # of this folder also where .venv is another clone's
ruff check .
ruff format --check .
mypy
for script in scripts/*.sh eval/*.sh .ci/run; do [ ! -e "$script" ] || bash -n "$script"; done
# Two engines would not fit a GPU
[ $# -gt 0 ] || nvidia-smi >/dev/null 2>&1 || set -- -n 2 --dist loadfile
exec python -m pytest "$@"
