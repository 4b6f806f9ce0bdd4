"""What happens to the others when one rank fails, stalls or is gone: the run ends soon, and says whose fault it was."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# What gloo and NCCL say of a partner that is gone; it is no cause.
GONE = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process exited")


@contextlib.contextmanager
def named_by_rank(is_users: Callable[[Exception], bool]) -> Iterator[None]:
    """End this process at once when it fails as one of several, with its rank before the error.

    An orderly exit would wait for threads that talk to the others, and they would wait for this rank.

    Args:
        is_users: whether an error is one that the user can correct, and so needs no traceback.
    """
    try:
        yield
    except Exception as error:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            raise
        text = " ".join(str(error).split())
        if any(words in text for words in GONE):
            text = f"another rank has ended; what it said last is the cause. Here: {text:.200}"
        elif not is_users(error):
            traceback.print_exc()
        print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {type(error).__name__}: {text}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def warn_of_old_store() -> None:
    """torchrun keeps its store over restarts, with addresses of ranks that are gone, unless it is told not to."""
    attempt, shares = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "USE_AGENT_STORE"))
    if attempt not in (None, "0") and shares == "True" and os.environ.get("RANK") == "0":
        print(
            "restarted with the store of the failed attempt: if ranks find no connection, start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            file=sys.stderr,
        )


class SlowRank(TrainerCallback):
    """Before each step all ranks wait for the last one, but not for ever.

    Args:
        patience: seconds; what a rank may need longer than the others for its rows, a save or an evaluation.
    """

    def __init__(self, patience: float):
        self.patience = timedelta(seconds=patience)
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            # Of gloo, which alone knows who is missing.
            self._group = dist.new_group(backend="gloo", timeout=self.patience)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._group is None:
            return
        try:
            dist.monitored_barrier(self._group, timeout=self.patience, wait_all_ranks=True)
        except RuntimeError as error:
            step, seconds = state.global_step + 1, self.patience.total_seconds()
            raise RuntimeError(
                f"before step {step} not all ranks arrived: they are gone, or over {seconds:g} seconds behind "
                f"(parallel.patience): {error}"
            ) from error
