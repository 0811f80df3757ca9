#!/usr/bin/env bash
# Set up the environment if necessary, lint, check types, and test. Arguments go to pytest:
#
#   bash scripts/test.sh tests/test_losses_divergence.py -k clip
#
# Without arguments all tests run, in two processes. -m "not vllm and not multiprocess" is the quick loop. They run in
# the CPU set, also where there is a GPU; --device gpu, as the first argument, takes the GPU set.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
if [ "${1:-} ${2:-}" = "--device gpu" ]; then venv=.venv-gpu && shift 2; fi
bash scripts/setup_env.sh "$([ $venv = .venv ] && echo cpu || echo gpu)"
source $venv/bin/activate

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TRL_EXPERIMENTAL_SILENCE=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # of this folder also where .venv is another clone's
ruff check .
ruff format --check .
mypy
for script in scripts/*.sh eval/*.sh .ci/run; do [ ! -e "$script" ] || bash -n "$script"; done
# Two engines would not fit a GPU
[ $# -gt 0 ] || [ $venv = .venv-gpu ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
exec python -m pytest "$@"
