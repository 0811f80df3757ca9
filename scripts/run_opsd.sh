#!/usr/bin/env bash
# A starting point for OPSD on your own data and model: copy this file and edit it. The values are the release's for
# 1.7B.
#
#   MODEL=Qwen/Qwen3-1.7B DATASET=data/train.jsonl OUTPUT_DIR=outputs/mine NUM_PROCESSES=4 bash scripts/run_opsd.sh
#
# Look at these first:
#   DATASET              a Hub id, a csv, tsv, json, jsonl or parquet file, or a folder of them, with a problem and a
#                        solution in each row; --problem_column and --solution_column name the columns
#   --lora_target_modules   all-linear for models whose projections have other names than Qwen3's
#   --jsd_token_clip     nats; clip_ratio/entries and clip_ratio/mass in the log say how much it cuts. The release
#                        takes 0.05 to 0.06 with a thinking teacher, and 1e-6 to 1e-7 without
#   --max_completion_length   tokens to learn from. More tokens cost more; they raised pass@k in paper v1 (Figure 4),
#                        and brought no stable gain in v3 (Figure 5)
#   --per_device_train_batch_size   lower it when memory runs out: the batch of a step stays --effective_batch_size
#   --vllm_gpu_memory_utilization   share of a GPU for vLLM; training has the rest
#
# Expected for the values below: see scripts/run_opsd_1b.sh. This project has not run them.
#
# MODEL, DATASET, OUTPUT_DIR, SEED, and NUM_PROCESSES (GPUs; without it those that CUDA_VISIBLE_DEVICES names).
# DRY_RUN=1 checks all arguments, prints command and configuration, and exits. Further arguments go to the program, the
# last one wins; --report_to wandb --wandb_project P logs to W&B.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-Qwen/Qwen3-1.7B}
export NUM_PROCESSES=$(bash scripts/num_processes.sh 4)
OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd}
DATASET=${DATASET:-siyanzhao/Openthoughts_math_30k_opsd}

arguments=(
    # model and adapter
    --model_name_or_path "$MODEL"
    --dtype bfloat16                                   # release: bf16
    --use_peft                                         # release, as paper Table 6
    --lora_r 64                                        # release, as paper Table 6
    --lora_alpha 128                                   # release, as paper Table 6
    --lora_dropout 0.0                                 # ours: not published; the trainer switches dropout off
    --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj # release, as paper Table 6

    # data
    --dataset_name "$DATASET"                          # release
    --dataset_split train                              # release
    --problem_column problem                           # release
    --solution_column solution                         # release
    --max_length 20000                                 # release: prompt and completion, in tokens

    # teacher and student
    --fixed_teacher                                    # release: the initial policy
    --student_thinking false                           # release
    --teacher_thinking true                            # release

    # loss
    --beta 0                                           # release: KL(teacher||student)
    --jsd_token_clip 0.05                              # release, for 1.7B and 4B
    --jsd_clip_mode pointwise                          # release: caps each (token, vocabulary entry) summand

    # rollouts
    --temperature 1.1                                  # release; also of both softmaxes in the loss
    --top_p 0.95                                       # release
    --top_k 20                                         # release
    --max_completion_length 1024                       # release
    --use_vllm true                                    # release
    --vllm_mode colocate                               # release
    --vllm_gpu_memory_utilization 0.6                  # release
    --vllm_tensor_parallel_size 1                      # release

    # optimization
    --learning_rate 5e-6                               # release
    --lr_scheduler_type constant                       # ours: not published; --max_steps then changes no checkpoint
    --warmup_steps 0                                   # ours: not published
    --max_grad_norm 0.1                                # release
    --effective_batch_size 32                          # release: prompts a step, of all GPUs together
    --per_device_train_batch_size 4                    # release
    --max_steps 100                                    # release; save often, since gains may peak early
    --bf16 true                                        # release
    --gradient_checkpointing true                      # release
    --seed "${SEED:-42}"                               # ours: the release sets none; the default of transformers

    # run
    --preflight                                        # ours: checks the claims of the method before the first step
    --save_steps 25                                    # release
    --logging_steps 2                                  # release
    --report_to none                                   # release: W&B
    --run_name opsd                                    # ours: of the W&B run
    --output_dir "$OUTPUT_DIR"
)
exec bash scripts/launch.sh opsd_train.py "${arguments[@]}" "$@"
