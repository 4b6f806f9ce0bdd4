"""`chorus-moe` whose rank 1 is killed before its fourth step, as a machine that fails; not again after a restart."""

import os
import signal
from typing import Any

from chorus_moe.serving.commands import main
from chorus_moe.training import train


class Killed(train.SlowRank):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if is_first and args.process_index == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_step_begin(args, state, control, **kwargs)


train.SlowRank = Killed

if __name__ == "__main__":
    main()
