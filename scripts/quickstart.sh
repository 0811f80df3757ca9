#!/usr/bin/env bash
# Watch a tiny model teach itself, in minutes and without a GPU. Options: bash scripts/quickstart.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
source .venv/bin/activate
exec python quickstart/run.py "$@"
