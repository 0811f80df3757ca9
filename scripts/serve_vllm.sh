#!/usr/bin/env bash
# Start the vLLM server that `opsd_train.py --use_vllm true --vllm_mode server --vllm_server_port PORT` samples from:
#
#   MODEL=Qwen/Qwen3-1.7B PORT=8000 MAX_LORA_RANK=64 bash scripts/serve_vllm.sh --tensor-parallel-size 2
#
# The training hands over its adapter before each step, through a folder that both see (--vllm_adapter_dir where they
# run on different machines) and an endpoint that loads any path: keep the port to machines that you trust.
# Further arguments go to vLLM, the last one wins. DRY_RUN=1 prints the command.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/activate.sh

MODEL=${MODEL:?name the model that is trained, as in --model_name_or_path}
PORT=${PORT:-8000}
MAX_LORA_RANK=${MAX_LORA_RANK:-64} # at least --lora_r; vLLM takes 1, 8, 16, 32, 64, 128, 256, 320 and 512

settings=( # and arguments, as opsd/vllm_engine.py has them for engines in the training processes
    VLLM_USE_FLASHINFER_SAMPLER="${VLLM_USE_FLASHINFER_SAMPLER:-0}"
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
    VLLM_SERVER_DEV_MODE=1 # grpo_train.py asks the server how it computes log-probabilities
)
arguments=(
    --model "$MODEL"
    --port "$PORT"
    --enable-lora
    --max-loras 1
    --max-cpu-loras 1
    --max-lora-rank "$MAX_LORA_RANK"
    --logprobs-mode raw_logprobs
    --hf-overrides '{"head_dtype": "float32"}'
)
if [ "$device" = cpu ]; then
    settings+=(
        VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
        VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
        VLLM_CPU_CI_ENV="${VLLM_CPU_CI_ENV:-1}"
        VLLM_ENABLE_V1_MULTIPROCESSING="${VLLM_ENABLE_V1_MULTIPROCESSING:-0}"
    )
    arguments+=(
        --dtype float32
        --enforce-eager
        --no-enable-chunked-prefill
        --gpu-memory-utilization 0.1
    )
fi
command=(env "${settings[@]}" python -m vllm.entrypoints.openai.api_server "${arguments[@]}" "$@")
printf '%q ' "${command[@]}" && echo
[ "${DRY_RUN:-0}" = 1 ] || exec "${command[@]}"
