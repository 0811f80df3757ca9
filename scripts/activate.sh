#!/usr/bin/env bash
# Source this in the project's folder. It sets `device`, and activates .venv-gpu where an NVIDIA driver answers, else
# .venv. One of the two that is active already stays, and so does any other (conda, an image) where they are missing.
if [ "${VIRTUAL_ENV:-/}" -ef .venv ]; then
    device=cpu
elif [ "${VIRTUAL_ENV:-/}" -ef .venv-gpu ]; then
    device=gpu
else
    if nvidia-smi >/dev/null 2>&1; then device=gpu venv=.venv-gpu; else device=cpu venv=.venv; fi
    if [ -e $venv/bin/activate ]; then source $venv/bin/activate; fi
fi
