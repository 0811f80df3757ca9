#!/usr/bin/env bash
# Make .venv (CPU) or .venv-gpu from the locked requirement set, with the project in it as an editable install.
# Idempotent: a second run with nothing to do takes a moment.
#
#   bash scripts/setup_env.sh [cpu|gpu]     default: gpu where an NVIDIA driver answers, else cpu
#
# Tests and quickstart run in the CPU set, recipes in the GPU set where there is a GPU (scripts/activate.sh).
# PYTHON=... chooses the interpreter (3.11 or 3.12); pip's own index settings are handed on to uv. An environment
# belongs to one folder: after a move of the folder it is made anew, and a link to that of another clone is left as it
# is. flash-attn is built last, for A100 and H100 unless FLASH_ATTN_CUDA_ARCHS says otherwise; MAX_JOBS=4 saves memory.
# Delete .venv-gpu/complete to try it again.
set -euo pipefail
cd "$(dirname "$0")/.."

device=${1:-$(nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)}
case $device in
cpu) venv=.venv ;;
gpu) venv=.venv-gpu ;;
*) echo "usage: bash scripts/setup_env.sh [cpu|gpu], got '$device'" >&2 && exit 2 ;;
esac
exec 9<. && flock 9 # one at a time in a folder: two scripts may set up at once
lock=requirements/$device.txt
stamp="$device $(cat "$lock" scripts/setup_env.sh | sha256sum | cut -d' ' -f1) $(pwd -P)"
[ "$(cat $venv/complete 2>/dev/null)" != "$stamp" ] || exit 0
[ ! -L $venv ] || { echo "setup_env.sh: $venv is a link to $(readlink $venv), which is left as it is" >&2 && exit 0; }
read -r old_device _ old_folder <<<"$(cat $venv/complete 2>/dev/null || true)"
if [ "${old_device:-$device}" != "$device" ]; then # from a time when both devices shared a name
    echo "setup_env.sh: $venv holds the $old_device set, which is left as it is: delete it, or rename it" >&2
    exit 1
fi

cuda=13 # of torch in requirements/gpu.txt
least_driver=580
if [ "$device" = gpu ]; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
    if ! [[ $driver =~ ^[0-9]+ ]]; then
        echo "setup_env.sh: no NVIDIA driver answers; where this shall run, it must be $least_driver or newer" >&2
    elif [ "${driver%%.*}" -lt $least_driver ] && ! [ -e "${CUDA_HOME:-/usr/local/cuda}/compat/libcuda.so" ]; then
        echo "setup_env.sh: the NVIDIA driver is $driver, and CUDA $cuda needs $least_driver or newer: torch would" \
            "find no GPU. Update the driver, or on data-centre GPUs install cuda-compat-13-0; or take the CPU set" >&2
        exit 1
    fi
fi

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

echo "setup_env.sh: installing the $device set into $venv with $("$python" --version)"
if ! suitable $venv/bin/python || [ "${old_folder:-$(pwd -P)}" != "$(pwd -P)" ]; then
    "$python" -m venv --clear $venv
fi
rm -f $venv/complete
$venv/bin/python -m pip install --quiet uv 2> >(grep -v 'is ignored: it is neither' >&2)

# uv does not read pip's configuration
eval "$($venv/bin/python -m pip config list | $venv/bin/python -c '
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
install() { $venv/bin/uv pip install --quiet --compile-bytecode --python $venv/bin/python --no-deps "$@"; }

if [ "$device" = gpu ]; then
    install -r "$lock"
elif ! install -r "$lock" 2>$venv/install.log; then
    grep -q 'torch' $venv/install.log || { cat $venv/install.log >&2 && exit 1; }
    install --torch-backend cpu -r "$lock" # the +cpu build from PyTorch's own index
fi
install --no-build-isolation --offline --editable . # the project itself, built by the setuptools of the lock
if [ "$device" = gpu ] && nvidia-smi >/dev/null 2>&1; then
    $venv/bin/python -c 'import torch; torch.zeros(1, device="cuda")' # says what is wrong, and ends this
fi
echo "$stamp" >$venv/complete # before the build that may take long: all works without it
[ "$device" = gpu ] || exit 0

# flash-attn builds against the torch that is now there, with nvcc of its CUDA version.
nvcc=$(command -v "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" nvcc | head -n 1 || true)
release=$([ -z "$nvcc" ] || "$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
export FLASH_ATTN_CUDA_ARCHS=${FLASH_ATTN_CUDA_ARCHS:-"80;90"}
if [ "${release%%.*}" != $cuda ]; then
    reason="needs nvcc of CUDA $cuda, and finds ${release:-none} (CUDA_HOME names another)"
elif ! install --no-build-isolation flash-attn==2.8.3.post2; then
    reason="did not build"
else
    exit 0
fi
echo "setup_env.sh: all is installed but flash-attn, which $reason. Go on with PyTorch's own attention; or install a" \
    "prebuilt wheel of the flash-attn project that fits torch and Python; or on H100 flash_attention_3, a wheel of" \
    "PyTorch's own index that needs no build: pip install flash-attn-3 --index-url" \
    "https://download.pytorch.org/whl/cu130, and --attn_implementation flash_attention_3" >&2
