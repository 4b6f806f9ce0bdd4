"""Run by the tests of `context`: one step of tiny models alone and with shared sequences, on every process of a group.

Each writes, for every case, how far losses and gradients are apart and the bytes that were kept for the backward.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.same_bits import SLIDING
from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.routing.observer import RoutingObserver
from chorus_moe.training.scale.context import share_sequences
from tests.conftest import tiny_batch, tiny_config

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "alignment_loss_coef": 0.5, "alignment": "maps"}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
EVERYTHING = LOSSES | SLIDING | {"num_global_tokens": 3, "cross_modal_layers": [1, 2]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": EVERYTHING,
    "skips": {"skip_budget": 0.3, "skip_loss_coef": 0.5, "exit_layers": [2], "exit_loss_coef": 0.5},
    "layers": {"skip_budget": 0.3, "skip_layers": [1], "skip_scope": "layer", "no_rope_layers": [1, 0, 1]},
    "learned": {
        "expert_banks": {"text": {"adaptive_experts": True, "mean_experts": 1.5}, "common": {"balance": "bias"}},
        "expert_budget_loss_coef": 0.5,
    },
    "eager": EVERYTHING,
    "blocks": EVERYTHING,
    "checkpointed": EVERYTHING,
    "packed": SLIDING,
    "bidirectional": {"is_causal": False, "cross_modal_layers": [1]},
}
IMPLEMENTATIONS = {"eager": "eager", "blocks": "block_local"}


def make(case: str) -> nn.Module:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(**HEADS | CASES[case])).train()
    if case in IMPLEMENTATIONS:
        model.set_attn_implementation(IMPLEMENTATIONS[case])
    if case == "checkpointed":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def batch_of(case: str, model: Any) -> dict[str, Tensor]:
    # 25 tokens: no number of processes divides them.
    batch = tiny_batch(model.config, length=25)
    if case == "packed":
        del batch["attention_mask"]
        batch["position_ids"] = (torch.arange(25) % 9).expand(3, -1)
    return batch


class Kept:
    """Bytes that autograd keeps, each storage once; weights are none of them."""

    def __init__(self, model: nn.Module):
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.tensors: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.tensors.append(tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def step(case: str, model: nn.Module) -> tuple[float, dict[str, Tensor], int, Tensor]:
    """Loss, gradients, bytes kept by the decoder, and choices of its experts."""
    batch, kept = batch_of(case, model), Kept(model)
    with RoutingObserver(model) as observer, saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    choices = torch.cat([bank.choices_ME.flatten() for bank in observer.counters.all()])
    return loss.item(), gradients, kept.bytes, choices


def run(case: str) -> dict[str, Any]:
    loss, expected, kept, choices = step(case, make(case))
    model = make(case)
    share_sequences(model, dist.get_world_size())
    own_loss, gradients, own_kept, own_choices = step(case, model)
    for gradient in gradients.values():
        # As DDP and FSDP do.
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    assert gradients.keys() == expected.keys()
    worst = {name: (gradients[name] - expected[name]).abs().max().item() for name in expected}
    name = max(worst, key=lambda name: worst[name])
    with torch.no_grad():
        model.eval()
        batch = batch_of(case, model)
        # One process alone: nothing is shared without gradients.
        alone = make(case).eval()(**batch).logits if dist.get_rank() else None
        evaluated = 0.0 if alone is None else (model(**batch).logits - alone).abs().max().item()
    return {
        "loss": abs(own_loss - loss),
        "gradient": worst[name],
        "where": name,
        "kept": own_kept / kept,
        "choices": bool(torch.equal(own_choices, choices)),
        "evaluated": evaluated,
    }


def main() -> None:
    """Arguments: a folder and names of cases."""
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for case in cases:
        try:
            found[case] = run(case)
        except Exception:
            # The others would wait for this one.
            found[case] = {"error": traceback.format_exc()}
            break
    (folder / f"{dist.get_world_size()}-{dist.get_rank()}.json").write_text(json.dumps(found))
    # Threads of the backend may hang an orderly exit; everything is written.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
