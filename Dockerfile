# The GPU environment with the project in /opsd. This file has not been built yet.
#
#   docker build -t opsd .
#   docker run --gpus all --ipc host -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#       -v "$PWD/outputs:/opsd/outputs" opsd bash scripts/run_opsd_1b.sh
#
# CUDA 13.0, as in requirements/gpu.txt (torch 2.13.0); the devel image has the nvcc that flash-attn is built with.
# --ipc host: NCCL exchanges data between GPUs through shared memory, of which a container has 64 MB.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git ca-certificates \
        python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opsd
# The environment first, so that a change of the code does not install it anew: the editable install of the project is
# only a path to this folder. "gpu" is said since no driver answers during a build: the machine that runs the image
# needs one of 580 or newer. setup_env.sh goes on without flash-attn where it does not build; MAX_JOBS bounds the
# memory of that build, FLASH_ATTN_CUDA_ARCHS names the GPUs (80: A100, 90: H100).
COPY requirements requirements
COPY pyproject.toml pyproject.toml
COPY scripts/setup_env.sh scripts/setup_env.sh
ARG MAX_JOBS=4
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
RUN PYTHON=python3.12 MAX_JOBS=$MAX_JOBS bash scripts/setup_env.sh gpu
ENV PATH=/opsd/.venv-gpu/bin:$PATH

COPY . .
CMD ["bash"]
