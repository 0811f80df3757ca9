"""Run by `test_gradient_does_not_depend_on_the_number_of_processes` in each of its processes, not by pytest."""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import TINY_MODEL, gradient_of_one_step, make_problems, make_trainer_factory


def main(result: str) -> None:
    runs = {"steps": {}}
    with tempfile.TemporaryDirectory() as folder:
        make_trainer = make_trainer_factory(TINY_MODEL, make_problems(), Path(folder))
        for accumulation in (1, 2, 4):
            runs["steps"][accumulation] = gradient_of_one_step(make_trainer, accumulation, prompts_per_process=4)
        trainer = make_trainer()
    noise = [torch.empty(4) for _ in range(2)]
    dist.all_gather(noise, torch.rand(4))
    runs |= {"noise": noise, "backend": dist.get_backend(), "world_size": dist.get_world_size()}
    runs["distributed_type"] = trainer.accelerator.distributed_type.value
    if trainer.accelerator.is_main_process:
        torch.save(runs, result)
    dist.barrier()
    dist.destroy_process_group()


main(sys.argv[1])
