"""Run by `objectives/test_distillation.py` in two processes: trains with a teacher and masked features, and writes each
rank's weights."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from chorus_moe.training.objectives import masked
from tests.training.objectives.test_distillation import distributed_trainer, first_half


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    trainer = distributed_trainer(folder, ddp_find_unused_parameters=True)
    masked.draw = first_half
    trainer.train()
    torch.save(trainer.model.state_dict() | trainer.objectives.state_dict(), folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    # Threads of the backend may hang an orderly exit; everything is written.
    os._exit(0)


if __name__ == "__main__":
    main()
