#!/usr/bin/env bash
# Group self-distillation on Qwen3-1.7B: OPSD from answers alone. Four rollouts of each problem are graded, and the teacher sees
# one of the others that is right in place of a reference solution. Beyond the paper; the rest is scripts/run_opsd_1b.sh.
#
#   bash scripts/run_opsd_answers.sh
#   CHECKPOINTS="outputs/opsd_answers/checkpoint-*" NUM_PROCESSES=4 bash eval/run_eval.sh
#
# Expected: nothing is published, and this project has not run it. To compare with: scripts/run_opsd_1b.sh, run_grpo.sh.
# What to look at: rollouts/correct_ratio, references/none_ratio (what is sampled in vain: where no other rollout is right),
# completions/truncated_ratio (a rollout that is cut off is not right: 1,024 tokens are few for hard problems).
#
# MODEL, NUM_PROCESSES (GPUs), OUTPUT_DIR. DRY_RUN=1 checks all arguments, prints command and configuration, and exits.
# Further arguments go to the program, the last one wins; --report_to wandb --wandb_project P logs to W&B.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-Qwen/Qwen3-1.7B}
export NUM_PROCESSES=${NUM_PROCESSES:-4}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/opsd_answers}

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
    --answer_column Answer                             # as GRPO in the release; no solutions are read
    --max_length 20000                                 # release: prompt and completion, in tokens

    # teacher and student
    --fixed_teacher                                    # release: the initial policy
    --teacher_reference rollout                        # ours
    --reference_fallback skip                          # ours; "answer" shows the teacher the right answer there
    --num_generations 4                                # ours: more find a right one more often, of fewer problems
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
    --effective_batch_size 32                          # release: rollouts a step, of all GPUs together
    --per_device_train_batch_size 4                    # release
    --max_steps 100                                    # release: the results end here, "peaks within 100 steps"
    --bf16 true                                        # release
    --gradient_checkpointing true                      # release
    --seed 42                                          # ours: the release sets none; the default of transformers

    # run
    --preflight                                        # ours: checks the claims of the method before the first step
    --save_steps 25                                    # release
    --logging_steps 2                                  # release
    --report_to none                                   # release: W&B
    --run_name opsd_answers                            # ours: of the W&B run
    --output_dir "$OUTPUT_DIR"
)
exec bash scripts/launch.sh opsd_train.py "${arguments[@]}" "$@"
