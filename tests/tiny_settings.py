"""Settings of runs on the tiny model that several test files and their workers share, under the names of the flags."""

# Any program, float32 on CPU
CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
}
ADAPTER = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
# OPSD: JSD against a teacher without thinking mode, on rollouts from the student's own distribution
OPSD = {
    "max_completion_length": 40,
    "max_length": 1000,
    "beta": 0.5,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "jsd_token_clip": 0.0,
    "max_grad_norm": 1.0,
    "teacher_thinking": False,
}
