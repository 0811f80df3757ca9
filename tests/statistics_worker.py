"""Run by `test_processes_share_them` in each of its processes, not by pytest."""

import sys
from pathlib import Path

import torch.distributed as dist
from helpers import TINY_MODEL, make_problems, make_trainer_factory, script_rollouts


def main(folder: Path) -> None:
    make_trainer = make_trainer_factory(TINY_MODEL, make_problems(), folder)
    trainer = make_trainer(save_token_statistics=5, max_steps=1, per_device_train_batch_size=2)
    script_rollouts(trainer)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
