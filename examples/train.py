"""
Train with `OPSDTrainer` from Python. The first argument is a model of the Hub or the folder of one.

    python examples/train.py Qwen/Qwen3-1.7B    # on a GPU
    python examples/train.py tests/tiny_model   # on a CPU, within a minute
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from opsd_trainer import OPSDConfig, OPSDTrainer

PROBLEMS = [  # the student sees the problem alone, the teacher also the solution
    {"problem": "964+494", "solution": r"We get ones 8, tens 15, hundreds 14, hence \boxed{1458}."},
    {"problem": "876+530", "solution": r"We get ones 6, tens 10, hundreds 14, hence \boxed{1406}."},
    {"problem": "141+365", "solution": r"We get ones 6, tens 10, hundreds 5, hence \boxed{506}."},
    {"problem": "623+597", "solution": r"We get ones 10, tens 12, hundreds 12, hence \boxed{1220}."},
]


def main(model: str, output_dir: str = "outputs/example") -> None:
    on_gpu = torch.cuda.is_available()
    settings = OPSDConfig(
        output_dir,
        fixed_teacher=True,  # the teacher is the model with its adapter off
        beta=0.5,  # JSD without a clip, as in the first version of the paper
        jsd_token_clip=0.0,
        teacher_thinking=False,
        max_completion_length=128,  # tokens of a rollout, all of which are learned from
        per_device_train_batch_size=len(PROBLEMS),
        learning_rate=2e-4,
        max_steps=10,
        logging_steps=1,
        bf16=on_gpu,
        model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"},
        report_to="none",
    )
    trainer = OPSDTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list(PROBLEMS),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()  # prints loss, divergence and more for each step
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
