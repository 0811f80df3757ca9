#!/usr/bin/env bash
# The GRPO baseline of the paper (Table 6) on Qwen3-1.7B; MODEL=Qwen/Qwen3-4B or Qwen/Qwen3-8B for the others.
#
#   bash scripts/run_grpo.sh
#   CHECKPOINTS="outputs/grpo/checkpoint-*" NUM_PROCESSES=8 bash eval/run_eval.sh \
#       --dataset aime24 aime25 hmmt25 amo-bench --val_n 16 --temperature 1.2 --top_p 0.95      # and the same MODEL
#
# Expected (paper v1, Table 2, average@16, temperature 1.2, top-p 0.95; on 8 x A100, time not given). This project has
# not run it.
#                    AIME24  AIME25  HMMT25  AMO-Bench
#   8B    base         75.2    68.3    43.1       13.4
#   8B    GRPO         76.7    68.7    45.0       14.8
#   4B    base         74.6    65.8    40.3       12.4
#   4B    GRPO         75.6    67.1    42.7       12.8
#   1.7B  base         50.2    35.2    25.4        4.3
#   1.7B  GRPO         52.1    38.3    26.7        4.5
# Paper v3, Table 2 (eval/run_eval.sh as it is: Avg@12, temperature 1.0; the best checkpoint within 500 steps):
#   8B    base         75.8    65.6    43.9
#   8B    GRPO         76.4    68.9    46.7
#   4B    base         74.9    66.4    42.2
#   4B    GRPO         75.6    68.1    44.4
#   1.7B  base         51.5    36.7    23.1
#   1.7B  GRPO         51.1    38.3    23.7
# The project page: within 100 steps more than half of the batches have no spread of rewards, and so no gradient.
# The reward compares the boxed answer by value; --reward exact_match compares texts.
#
# MODEL, DATASET, OUTPUT_DIR, SEED, and NUM_PROCESSES (GPUs; without it those that CUDA_VISIBLE_DEVICES names).
# DRY_RUN=1 checks all arguments, prints command and configuration, and exits. Further arguments go to the program, the
# last one wins; --report_to wandb --wandb_project P logs to W&B.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-Qwen/Qwen3-1.7B}
export NUM_PROCESSES=$(bash scripts/num_processes.sh 8)
OUTPUT_DIR=${OUTPUT_DIR:-outputs/grpo}
DATASET=${DATASET:-siyanzhao/Openthoughts_math_30k_opsd}

arguments=(
    # model and adapter
    --model_name_or_path "$MODEL"
    --dtype bfloat16                                   # section 8.1: bfloat16
    --use_peft                                         # Table 6
    --lora_r 64                                        # Table 6
    --lora_alpha 128                                   # Table 6
    --lora_dropout 0.0                                 # ours: not published; rollouts have no dropout either
    --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj # Table 6

    # data and reward
    --dataset_name "$DATASET"                          # release; section 4.1: the same data as OPSD
    --dataset_split train                              # release
    --problem_column Question                          # release
    --answer_column Answer                             # release
    --max_prompt_length 2048                           # release
    --reward math                                      # ours: 1 for an equal value in \boxed{}, else 0 (see above)

    # objective
    --num_generations 8                                # Table 6, section 4.1: rollouts per prompt
    --beta 0                                           # Table 6: no KL term
    --scale_rewards group                              # release
    --loss_type dapo                                   # ours: not published; TRL's default: mean over a step's tokens
    --num_iterations 1                                 # ours: not published; TRL's default
    --epsilon 0.2                                      # ours: not published; TRL's default
    --cast_lm_head_to_fp32 true                        # ours: logits in float32, as those of the engine are

    # rollouts
    --thinking true                                    # ours: not published; evaluation is in thinking mode
    --temperature 1.2                                  # Table 6
    --top_p 1.0                                        # off: Table 6 names none
    --top_k 0                                          # off: Table 6 names none
    --max_completion_length 16000                      # Table 6; Figure 3 says 16,384
    --use_vllm true                                    # release
    --vllm_mode colocate                               # release
    --vllm_gpu_memory_utilization 0.6                  # release, for OPSD
    --vllm_tensor_parallel_size 1                      # release, for OPSD

    # optimization
    --learning_rate 2e-5                               # Table 6; section 4.1 says 1e-5
    --lr_scheduler_type cosine                         # section 4.1
    --warmup_steps 0.1                                 # section 4.1: share of all steps
    --max_grad_norm 1.0                                # ours: not published; the default of transformers
    --effective_batch_size 32                          # Table 6; TRL counts completions: 4 prompts x 8 rollouts a step
    --per_device_train_batch_size 1                    # Table 6: 1 x 4 on each of 8 GPUs
    --max_steps 100                                    # ours: project page: within 100 steps; v3 within 500
    --bf16 true                                        # section 8.1
    --gradient_checkpointing true                      # section 8.1
    --seed "${SEED:-42}"                               # ours: not published; the default of transformers

    # run
    --save_steps 25                                    # ours: as OPSD
    --logging_steps 2                                  # ours: as OPSD
    --report_to none                                   # release: W&B
    --run_name grpo                                    # ours: of the W&B run
    --output_dir "$OUTPUT_DIR"
)
exec bash scripts/launch.sh grpo_train.py "${arguments[@]}" "$@"
