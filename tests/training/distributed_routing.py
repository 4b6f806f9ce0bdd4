"""Run by `test_routing_callback.py` in two processes: trains, and writes each rank's bias, counts and
rewarded routers."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chorus_moe.training.routing.callback import RoutingCallback
from chorus_moe.training.routing.reward import RouterRewardTrainer
from tests.training.routing.test_callback import biases, metric
from tests.training.routing_streams import make_trainer, rewarded_model, router_weights, skewed_model, token_rows


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    model, callback = skewed_model(), RoutingCallback()
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.0, "logging_steps": 1, "max_steps": 6}
    trainer = make_trainer(
        model, folder / "two", token_rows(48), callbacks=[callback], ddp_find_unused_parameters=False, **settings
    )
    trainer.train()
    found: dict[str, Any] = {
        "biases": biases(model),
        "choices": [bank.choices_ME.tolist() for bank in callback.last.all()],
        "strongest": metric(trainer, "routing_strongest_share"),
    }
    model = rewarded_model()
    rewarded = {"router_reward_banks": ["common"], "learning_rate": 1e-2, "max_steps": 3}
    make_trainer(
        model, folder / "reward", token_rows(48), RouterRewardTrainer, ddp_find_unused_parameters=False, **rewarded
    ).train()
    found["rewarded"] = router_weights(model)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    # Threads of the backend may hang an orderly exit; everything is written.
    os._exit(0)


if __name__ == "__main__":
    main()
