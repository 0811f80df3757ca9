#!/usr/bin/env bash
# Watch a tiny model teach itself, in minutes and without a GPU. Options: bash scripts/quickstart.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *" --device gpu "*) device=gpu venv=.venv-gpu ;; *) device=cpu venv=.venv ;; esac
bash scripts/setup_env.sh $device
source $venv/bin/activate
[ $device = cpu ] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # its programs are single processes

# One thread is the fastest for a tiny model
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TRL_EXPERIMENTAL_SILENCE=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # of this folder also where .venv is another clone's
exec python quickstart/run.py "$@"
