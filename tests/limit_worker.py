"""Run by `test_launchers.py` under `accelerate launch`: the same steps with and without a limit of tokens."""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from helpers import TINY_MODEL, Recorder, make_problems, make_trainer_factory, script_rollouts, work_out
from launch_worker import describe, let_fsdp_run_on_cpu, partition_larger_weights, whole

from opsd_trainer import OPSDTrainer


def main(result: str) -> None:
    """
    Train two steps of SGD, whose change of the weights is the gradient, and evaluate: padded, packed, with two limits.

    The teacher is an average of the students, the loss is clipped and over the student's top tokens. The rollouts of
    the second process are longer, so that it alone needs the higher number of micro-batches.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_fsdp_run_on_cpu()
    partition_larger_weights()
    sizes: list[list[int]] = []  # of each micro-batch: rollouts and tokens of both roles
    compute = OPSDTrainer._share_of_loss

    def note(self, model, batch):
        if model.training:
            sizes.append([len(batch.rows), sum(batch.student.lengths) + sum(batch.teacher.lengths)])
        return compute(self, model, batch)

    OPSDTrainer._share_of_loss = note
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        problems = make_problems()
        make_trainer = make_trainer_factory(TINY_MODEL, problems, Path(folder))
        for name, limit in (("padded", None), ("packed", None), ("300", 300), ("1", 1)):
            sizes.clear()
            trainer = make_trainer(
                packing=name != "padded",
                max_tokens_per_micro_batch=limit,
                fixed_teacher=False,
                use_ema_teacher=True,
                ema_decay=0.5,
                top_k_loss=20,
                jsd_clip_mode="token",
                jsd_token_clip=0.5,
                gradient_accumulation_steps=2,
                max_steps=2,
                optim="sgd",
                learning_rate=1.0,
                max_grad_norm=1e9,
                lora_settings={"init_lora_weights": False},
                eval_dataset=problems.select(range(8)),
                per_device_eval_batch_size=4,
                callbacks=[recorder := Recorder()],
            )
            length = 60 if trainer.accelerator.process_index else 5  # in characters
            script_rollouts(trainer, lambda problem, _, length=length: work_out(problem)[:length] + "<|im_end|>")
            trained = {key: w for key, w in trainer.model.named_parameters() if w.requires_grad}
            before = {key: whole(trainer, weight) for key, weight in trained.items()}
            trainer.train()
            after = {key: w for key, w in trainer.model.named_parameters() if w.requires_grad}  # FSDP's are others
            runs[name] = {
                "changes": {key: whole(trainer, weight) - before[key] for key, weight in after.items()},
                "losses": recorder.values("loss"),
                "eval_loss": trainer.evaluate()["eval_loss"],
                "sizes": gather_object([list(sizes)]),
                "process": describe(trainer),
            }
    if trainer.accelerator.is_main_process:
        torch.save(runs, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
