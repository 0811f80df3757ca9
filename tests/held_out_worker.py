"""Run by `test_several_processes_measure_together` in each of its processes, not by pytest."""

import json
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from accelerate.utils import gather_object
from helpers import TINY_MODEL, Recorder, make_problems, make_trainer_factory, script_rollouts, work_out


def main(result: str) -> None:
    problems, recorder, wrong = make_problems(), Recorder(), {0: {2}, 1: {0, 1, 2}}
    held_out = problems.select(range(40, 45))
    places = {problem: place for place, problem in enumerate(held_out["problem"])}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer_factory(TINY_MODEL, problems, Path(folder))(
            callbacks=[recorder], eval_dataset=held_out, eval_accuracy_samples=2, eval_strategy="steps", max_steps=1
        )
        script_rollouts(
            trainer,
            lambda problem, _: work_out(problem, places.get(problem) not in wrong[trainer.state.global_step]),
        )
        sizes, grade = [], trainer.teacher_context.verifier
        trainer.teacher_context.verifier = lambda texts, *data: sizes.append(len(texts)) or grade(texts, *data)
        trainer.train()
    measured = {name: recorder.values(name) for logs in recorder.logs for name in logs if "accuracy" in name}
    measured |= {"world_size": dist.get_world_size(), "num_samples": gather_object([sizes[1]])}
    if trainer.accelerator.is_main_process:
        Path(result).write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


main(sys.argv[1])
