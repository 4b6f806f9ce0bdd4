"""Run by `objectives/test_contrast.py` in two processes: the gradients of one contrast over the rows of both."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.training.objectives.test_contrast import ROWS, gradients


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = gradients(ROWS[6:] if rank else ROWS[:6])
    if rank == 0:
        torch.save(found, Path(sys.argv[1]) / "gradients.pt")
    dist.barrier()
    # Threads of the backend may hang an orderly exit; everything is written.
    os._exit(0)


if __name__ == "__main__":
    main()
