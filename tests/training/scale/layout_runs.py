"""Run by the tests of layouts in 1, 2 or 4 processes: trains tiny models, and writes what each rank found as JSON.

Every run sees the same four rows a step, however many processes share them.
"""

import contextlib
import errno
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from transformers import TrainerCallback

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import freeze
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.lora import lora_config
from chorus_moe.training.recipe import TRAINER_SETTINGS, RunArguments
from chorus_moe.training.routing.callback import RoutingCallback
from chorus_moe.training.scale.faults import SlowRank, named_by_rank
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.ranks import hold_same_rows
from chorus_moe.training.scale.spread import loading_in_shares, shares, spread
from chorus_moe.training.trainer import ChorusTrainer
from tests.training.conftest import make_model, make_rows, make_tokenizer

STEPS, ROWS = 20, 4
WRITE = HuggingFaceStorageWriter.write_data
# Every rule that balances, limits and skips.
ROUTING: dict[str, Any] = {
    "text": {"router": "sigmoid", "balance": "bias"},
    "image": {"balance": "cv2", "expert_capacity": 1.5, "capacity_overflow": "drop"},
    "audio": {"balance": "variance", "adaptive_experts": True},
    "common": {"balance": "switch", "expert_capacity": 4},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "routing": {"expert_banks": ROUTING, "router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1},
    "exits": {"exit_layers": [1], "exit_loss_coef": 0.5},
    "context": {
        **{"router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1, "alignment_loss_coef": 0.1, "alignment": "maps"},
        **{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "num_global_tokens": 2},
        **{"cross_modal_layers": [1], "num_key_value_heads": 4},
        "expert_banks": {name: bank | {"expert_capacity": None} for name, bank in ROUTING.items()},
    },
    "frozen": {},
    "adapter": {},
    "attention adapter": {"num_key_value_heads": 4},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "adapter": {"banks": ["image", "common"], "cross_modal": True, "router": "train"},
    # Of what a tensor group shares out, and of what it leaves whole.
    "attention adapter": {"attention": True, "cross_modal": True, "connectors": True, "router": "train"},
}
# Of the kind `routing`, saved here by the test; a run of the kind `loaded` begins with it.
MODEL = "model"


def make(kind: str, layout: Layout, folder: Path) -> nn.Module:
    if kind == "loaded":
        options = loading_in_shares(layout, ChorusForConditionalGeneration, str(folder.parent / MODEL))
        return ChorusForConditionalGeneration.from_pretrained(folder.parent / MODEL, **options).train()
    model = make_model(make_tokenizer(), num_hidden_layers=2, **KINDS[kind]).train()
    if kind == "frozen":
        freeze(model, "towers")
    if kind in ADAPTERS:
        torch.manual_seed(0)
        model = get_peft_model(model, lora_config(model, **ADAPTERS[kind]))
    return model


def write_model_and_rows(folder: Path) -> None:
    """`model` and `rows.jsonl`, which recipes of these tests train."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, num_hidden_layers=2)
    model.save_pretrained(folder / "model")
    processor_from_config(model.config, tokenizer).save_pretrained(folder / "model")
    rows = [json.dumps({"text": f"what is it? {'three four five'.split()[i % 3]} {i}"}) for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows))


def no_space(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Fault(TrainerCallback):
    """What rank 1 does at its second step."""

    def __init__(self, kind: str):
        self.kind = kind

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index != 1 or state.global_step != 1:
            return
        if self.kind == "raises":
            raise ArithmeticError("the rows of rank 1 make no sense")
        if self.kind == "slow":
            time.sleep(4)
        if self.kind == "disk":
            HuggingFaceStorageWriter.write_data = no_space


def trainer_of(
    kind: str, layout: Layout, folder: Path, is_background: bool = False, fault: str | None = None, **settings: Any
) -> ChorusTrainer:
    AcceleratorState._reset_state()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = {"max_steps": STEPS, "per_device_train_batch_size": max(1, ROWS // (world // layout.copies))}
    defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-3}
    arguments = RunArguments(
        str(folder), **{**defaults, **TRAINER_SETTINGS, **sizes, "save_strategy": "no", **settings}
    )
    # Known once the arguments have made the group of processes.
    hold_same_rows(layout.copies, layout.context)
    model = make(kind, layout, folder)
    # Before anything else could have spread it.
    held = shares(model)["own"]
    processor = processor_from_config(model.config, make_tokenizer())
    spread(model, layout)
    trainer = ChorusTrainer(
        model=model,
        args=arguments,
        train_dataset=make_rows(ROWS * 3),
        data_collator=ChorusDataCollator(processor),
        processing_class=processor,
        background_saves=is_background,
    )
    RoutingCallback.add_to(trainer)
    trainer.held_when_made = held  # type: ignore[attr-defined]
    if fault is not None:
        trainer.add_callback(Fault(fault))
        trainer.add_callback(SlowRank(1.0))
    return trainer


def run(folder: Path, kind: str, sizes: dict[str, int], resume: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    trainer = trainer_of(kind, Layout(**sizes), folder, **settings)
    found = shares(trainer.model) | {"held": trainer.held_when_made}  # type: ignore[attr-defined]
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    strongest = [entry["routing_strongest_share"] for entry in logs if "routing_strongest_share" in entry]
    return found | {"losses": [entry["loss"] for entry in logs], "strongest": strongest}


def main() -> None:
    """Arguments: a folder, and a JSON list of runs, `[name, kind, sizes, checkpoint or null, settings]` each."""
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found: dict[str, Any] = {}
    for name, *asked in runs:
        begun = time.monotonic()
        try:
            # A rank that raises ends itself, as in `chorus-moe train`.
            with named_by_rank(lambda error: False) if name == "raises" else contextlib.nullcontext():
                found[name] = run(folder / name, *asked)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        HuggingFaceStorageWriter.write_data = WRITE
        found[name] |= {"seconds": time.monotonic() - begun, "processor": time.process_time()}
        (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
    # Threads of the backend may hang an orderly exit; everything is written.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
