#!/usr/bin/env bash
# Make .venv from the locked requirement set, with the project in it as an editable install. Idempotent: a second run
# with nothing to do takes a moment.
#
#   bash scripts/setup_env.sh [cpu|gpu]     default: gpu where an NVIDIA driver answers, else cpu
#
# PYTHON=... chooses the interpreter (3.11 or 3.12); pip's own index settings are handed on to uv. A .venv belongs to
# one folder: after a move of the folder it is made anew, and a link to the .venv of another clone is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

device=${1:-$(nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)}
case $device in cpu | gpu) ;; *) echo "usage: bash scripts/setup_env.sh [cpu|gpu], got '$device'" >&2 && exit 2 ;; esac
lock=requirements/$device.txt
stamp="$device $(cat "$lock" scripts/setup_env.sh | sha256sum | cut -d' ' -f1) $(pwd -P)"
[ "$(cat .venv/complete 2>/dev/null)" != "$stamp" ] || exit 0
[ ! -L .venv ] || { echo "setup_env.sh: .venv is a link to $(readlink .venv), which is left as it is" >&2 && exit 0; }

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
for python in ${PYTHON:-python3 python3.12 python3.11}; do
    suitable "$python" && break || python=
done
if [ -z "$python" ]; then
    echo "setup_env.sh: needs Python 3.11 or 3.12; install one or set PYTHON=/path/to/python" >&2
    exit 1
fi
if ! command -v g++ >/dev/null; then
    echo "setup_env.sh: no g++ found; DeepSpeed compiles an extension when it is first used" >&2
fi

echo "setup_env.sh: installing the $device set into .venv with $("$python" --version)"
read -r old_device _ old_folder <<<"$(cat .venv/complete 2>/dev/null || true)"
if ! suitable .venv/bin/python || [ "${old_device:-$device} ${old_folder:-$(pwd -P)}" != "$device $(pwd -P)" ]; then
    "$python" -m venv --clear .venv
fi
rm -f .venv/complete
.venv/bin/python -m pip install --quiet uv 2> >(grep -v 'is ignored: it is neither' >&2)

# uv does not read pip's configuration
eval "$(.venv/bin/python -m pip config list | .venv/bin/python -c '
import ast, os, re, shlex, sys
names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
names["cert"] = "SSL_CERT_FILE"
for line in sys.stdin:
    match = re.fullmatch(r"(?:global|install|:env:)\.([a-z-]+)=(.*)\n?", line)
    if match and match[1] in names and names[match[1]] not in os.environ:
        values = ast.literal_eval(match[2]).split()
        print("export", names[match[1]] + "=" + shlex.quote(("," if match[1] == "find-links" else " ").join(values)))
')"
export UV_INDEX_STRATEGY=unsafe-best-match UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
install() { .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --no-deps "$@"; }

if [ "$device" = cpu ]; then
    if ! install -r "$lock" 2>.venv/install.log; then
        grep -q 'torch' .venv/install.log || { cat .venv/install.log >&2 && exit 1; }
        install --torch-backend cpu -r "$lock" # the +cpu build from PyTorch's own index
    fi
else
    install -r "$lock"
    # Builds against the torch that is now there. Training falls back to PyTorch's attention without it.
    install --no-build-isolation flash-attn==2.8.3.post2 ||
        echo "setup_env.sh: flash-attn did not build (needs nvcc of torch's CUDA version; MAX_JOBS=4 saves memory)." \
            "Go on without it, or install a prebuilt wheel of the flash-attn project that fits torch and Python." >&2
fi
install --no-build-isolation --offline --editable . # the project itself, built by the setuptools of the lock
echo "$stamp" >.venv/complete
