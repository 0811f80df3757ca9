#!/usr/bin/env bash
# OPSD on Qwen3-1.7B with a teacher that follows the student as an exponential moving average, in place of the fixed one. The
# first release had the option; its settings and results are not published. The rest is scripts/run_opsd_1b.sh.
#
#   bash scripts/run_opsd_ema.sh
#   CHECKPOINTS="outputs/opsd_ema/checkpoint-*" NUM_PROCESSES=4 bash eval/run_eval.sh
#
# Expected: not published. To compare with: scripts/run_opsd_1b.sh. This project has not run it.
# With a decay of 0.999 the teacher is slow: after 100 steps the initial policy still has nine tenths of its weight.
#
# MODEL, NUM_PROCESSES (GPUs), OUTPUT_DIR. DRY_RUN=1 checks all arguments, prints command and configuration, and exits.
# Further arguments go to the program, the last one wins; --report_to wandb --wandb_project P logs to W&B.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-Qwen/Qwen3-1.7B}
export NUM_PROCESSES=${NUM_PROCESSES:-4}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd_ema}

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
    --dataset_name siyanzhao/Openthoughts_math_30k_opsd # release
    --dataset_split train                              # release
    --problem_column problem                           # release
    --solution_column solution                         # release
    --max_length 20000                                 # release: prompt and completion, in tokens

    # teacher and student
    --use_ema_teacher                                  # first release; not together with --fixed_teacher
    --ema_decay 0.999                                  # ours: not published (see above)
    --ema_update_steps 1                               # ours: not published
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
    --lr_scheduler_type constant                       # ours: not published; a checkpoint then does not depend on --max_steps
    --warmup_steps 0                                   # ours: not published
    --max_grad_norm 0.1                                # release
    --effective_batch_size 32                          # release: prompts a step, of all GPUs together
    --per_device_train_batch_size 4                    # release
    --max_steps 100                                    # as run_opsd_1b.sh
    --bf16 true                                        # release
    --gradient_checkpointing true                      # release
    --seed 42                                          # ours: the release sets none; the default of transformers

    # run
    --preflight                                        # ours: checks the claims of the method before the first step
    --save_steps 25                                    # release
    --logging_steps 2                                  # release
    --report_to none                                   # release: W&B
    --run_name opsd_ema                                # ours: of the W&B run
    --output_dir "$OUTPUT_DIR"
)
exec bash scripts/launch.sh opsd_train.py "${arguments[@]}" "$@"
