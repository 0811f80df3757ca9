# Source this in the project's folder: it activates .venv-gpu where an NVIDIA driver answers, else .venv. Where there
# is no such folder, the environment stays the one that is active (conda, an image).
if nvidia-smi >/dev/null 2>&1; then venv=.venv-gpu; else venv=.venv; fi
if [ -e $venv/bin/activate ]; then source $venv/bin/activate; fi
