"""Run by `test_distributed.py` in two processes: writes one line of JSON a check.

Each rank holds its own part of one global batch, with other modalities than its partner. Gradients are compared with
those of one process that sees the whole batch in one forward per part (the Trainer's accumulation).
"""

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from chorus_moe import ChorusForConditionalGeneration, ChorusForContrastive
from chorus_moe.modeling.losses import infonce_loss
from tests.conftest import tiny_batch, tiny_config
from tests.modeling.test_modeling_heads import contrastive, triples

Batch = dict[str, Tensor]
MEDIA = ("pixel_values", "input_features", "input_features_mask")


def parts(kind: str) -> list[Batch]:
    """What rank 0 and rank 1 hold: an image with its text against text, sound or a batch without any label."""
    batch = tiny_batch(tiny_config())
    rows = {name: value for name, value in batch.items() if name not in MEDIA}
    image = {name: value[:1] for name, value in rows.items()} | {"pixel_values": batch["pixel_values"][:1]}
    sound = {name: value[1:2] for name, value in rows.items()}
    sound |= {"input_features": batch["input_features"][:1], "input_features_mask": batch["input_features_mask"][:1]}
    text = {name: value[:1].clone() for name, value in rows.items() if name != "mm_token_type_ids"}
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] < 5, 9)
    if kind == "no labels":
        text["labels"] = torch.full_like(text["labels"], -100)
    return [image, sound if kind in ("audio", "routing") else text]


# Every router, balance loss and limit; what is drawn at random would differ between ranks by itself.
ROUTING: dict[str, Any] = {
    "text": {"router": "sigmoid", "num_groups": 2, "topk_groups": 1},
    "image": {"router": "attention", "balance": "cv2", "adaptive_experts": True},
    "audio": {"expert_capacity": 1.5, "capacity_overflow": "drop"},
    "common": {"balance": "variance", "expert_capacity": 4, "expert_depth": 2},
}


def make(kind: str) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    options = {"router_z_loss_coef": 0.1, "alignment_loss_coef": 0.1}
    if kind == "routing":
        options |= {"expert_banks": ROUTING, "router_aux_loss_coef": 1.0}
    if kind == "windows":
        options |= {"layer_types": ["sliding_attention"] * 2 + ["full_attention"], "sliding_window": 5}
        options |= {"num_global_tokens": 2}
    return ChorusForConditionalGeneration(tiny_config(**options)).train()


def step(model: nn.Module, batch: Batch, num_items: Tensor, scale: float) -> None:
    (model(**batch, num_items_in_batch=num_items).loss * scale).backward()


def count(pieces: list[Batch]) -> Tensor:
    return sum((piece["labels"][:, 1:] != -100).sum() for piece in pieces)


def expected_gradients(kind: str) -> dict[str, Tensor]:
    model, pieces = make(kind), parts(kind)
    for piece in pieces:
        step(model, piece, count(pieces), 1.0)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst_difference(model: nn.Module, kind: str) -> float:
    """Largest difference to the gradients of one process, over the largest of the tensor (at least 1e-3)."""
    worst = 0.0
    expected = expected_gradients(kind)
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        scale = max(float(expected[name].abs().max()), 1e-3)
        worst = max(worst, float((gradient - expected[name]).abs().max()) / scale)
    return worst


def ddp(kind: str, checkpointing: bool) -> float:
    model = make(kind)
    if checkpointing:
        model.activation_checkpointing_enable()
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    pieces = parts(kind)
    for _ in range(2):  # the second step raises if the first left a parameter unused
        wrapped.zero_grad()
        # The gradients are averaged over ranks, the loss is a share of the whole: hence the factor, as in the Trainer.
        step(wrapped, pieces[dist.get_rank()], count(pieces), dist.get_world_size())
    return worst_difference(wrapped, kind)


def fsdp(kind: str) -> float:
    model = make(kind)
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    for tower in (model.model.vision_tower, model.model.audio_tower):
        fully_shard(tower)
    fully_shard(model)
    pieces = parts(kind)
    for _ in range(2):
        model.zero_grad()
        step(model, pieces[dist.get_rank()], count(pieces), dist.get_world_size())
    return worst_difference(model, kind)


def parallel_plan(folder: Path, **sizes: int) -> float:
    """Largest difference of the logits to a model that is not split."""
    batch = tiny_batch(tiny_config())
    del batch["labels"]
    whole = ChorusForConditionalGeneration.from_pretrained(folder).eval()
    split = ChorusForConditionalGeneration.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).eval()
    spread = [name for name, p in split.named_parameters() if isinstance(p, DTensor)]
    sharded = [name for name, p in split.named_parameters() if p.shape != whole.get_parameter(name).shape]
    assert spread or sharded, "nothing was split"
    with torch.no_grad():
        expected, found = whole(**batch).logits, split(**copy.copy(batch)).logits
    found = found.full_tensor() if isinstance(found, DTensor) else found
    real = batch["attention_mask"].bool()
    return float((expected - found)[real].abs().max())


def expert_parallel_training(folder: Path) -> float:
    """Largest difference of the feed-forwards' gradients to a model that is not split, where some slots are unused."""
    whole = make("routing")
    size = DistributedConfig(tp_size=2, ep_size=2)
    split = ChorusForConditionalGeneration.from_pretrained(folder, distributed_config=size).train()
    batch = tiny_batch(tiny_config())
    for model in (whole, split):
        model(**copy.copy(batch)).loss.backward()
    worst = 0.0
    for name, parameter in split.named_parameters():
        if ".mlp." not in name:
            continue
        expected, found = whole.get_parameter(name).grad, parameter.grad
        found = found.full_tensor() if isinstance(found, DTensor) else found
        worst = max(worst, float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-3))
    return worst


def contrast(loss: str, part: slice | None = None) -> nn.Module:
    """The gradients of a contrastive model of some rows; of those of this rank, if none are named."""
    model = contrastive(loss, router_aux_loss_coef=0.0).train()
    if part is not None:
        model(**{name: value[part] for name, value in triples().items()}).loss.backward()
        return model
    wrapped = DistributedDataParallel(model)
    # Two rows on one rank, one on the other.
    own = slice(0, 2) if dist.get_rank() == 0 else slice(2, 3)
    wrapped(**{name: value[own] for name, value in triples().items()}).loss.backward()
    return model


def contrast_apart(loss: str) -> float:
    """Largest difference of a gradient to that of one process with all rows, over the largest of the tensor."""
    found = contrast(loss)
    # In the process group as well, but in evaluation's manner: on its own rows.
    group, dist.is_initialized = dist.is_initialized, lambda: False
    whole = contrast(loss, slice(0, 3))
    dist.is_initialized = group
    worst = 0.0
    for name, parameter in found.named_parameters():
        expected = whole.get_parameter(name).grad
        worst = max(worst, float((parameter.grad - expected).abs().max()) / max(float(expected.abs().max()), 1e-3))
    return worst


def contrast_split(folder: Path) -> float:
    """Difference of the loss in training to a model that is not split: both ranks hold the same rows."""
    whole = ChorusForContrastive.from_pretrained(folder).train()
    split = ChorusForContrastive.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).train()
    assert split.tp_size == 2
    batch = triples()
    found = split(**batch).loss
    vectors = [getattr(whole(**batch), f"{name}_embeds") for name in ("text", "image", "audio")]
    scores = [a @ b.T * whole.logit_scale.exp() for a, b in combinations(vectors, 2)]
    return float((found - torch.stack([infonce_loss(s) for s in scores]).mean()).abs())


def checks(folder: Path) -> dict[str, Callable[[], float]]:
    found: dict[str, Callable[[], float]] = {}
    for kind in ("text", "audio", "no labels", "routing"):
        found[f"ddp, {kind}"] = lambda kind=kind: ddp(kind, False)
        found[f"fsdp2, {kind}"] = lambda kind=kind: fsdp(kind)
    found["ddp with checkpointing, text"] = lambda: ddp("text", True)
    found["ddp with checkpointing, routing"] = lambda: ddp("routing", True)
    found["training with unused slots, experts apart"] = lambda: expert_parallel_training(folder / "routing")
    for loss in ("infonce", "sigmoid"):
        found[f"contrast, {loss}, rows apart"] = lambda loss=loss: contrast_apart(loss)
    found["contrast, tensor parallel"] = lambda: contrast_split(folder / "contrast")
    found["tensor parallel"] = lambda: parallel_plan(folder, tp_size=2)
    found["expert parallel"] = lambda: parallel_plan(folder, tp_size=2, ep_size=2)
    found["tensor parallel, routing"] = lambda: parallel_plan(folder / "routing", tp_size=2)
    found["tensor parallel, windows"] = lambda: parallel_plan(folder / "windows", tp_size=2)
    found["expert parallel, routing"] = lambda: parallel_plan(folder / "routing", tp_size=2, ep_size=2)
    return found


def main() -> None:
    folder, output, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, check in checks(Path(folder)).items():
        if names and name not in names:
            continue
        result: dict[str, Any] = {"name": name, "rank": dist.get_rank()}
        try:
            result["worst"] = check()
        except Exception as error:  # the other checks still run; the test of this one fails with the message
            result["error"] = f"{error}\n{traceback.format_exc()[-3000:]}"
        with (Path(output) / f"{dist.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        dist.barrier()
    # FSDP2 leaves threads behind that may hang an orderly exit; everything is written.
    os._exit(0)


if __name__ == "__main__":
    main()
