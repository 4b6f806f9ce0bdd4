"""Parts of a model on the disk or in another memory: accelerate loads a module's weights when it is called."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from tests.conftest import AUDIO_TOKEN, IMAGE_TOKEN, tiny_batch, tiny_config

PARTS = ["model.vision_tower", "model.audio_tower", "model.vision_connector", "model.audio_connector"]
PARTS += ["model.language_model", "lm_head"]


def make(**changes: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    config = tiny_config(cross_modal_layers=[1])
    vision = config.vision_config.to_dict() | changes
    names = ("architecture", "model_args", "image_size", "pool_size")
    config = type(config)(
        text_config=config.text_config,
        vision_config={name: vision[name] for name in names},
        audio_config=config.audio_config,
        image_token_id=IMAGE_TOKEN,
        audio_token_id=AUDIO_TOKEN,
    )
    return ChorusForConditionalGeneration(config).eval()


def logits_of(model: ChorusForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_a_part_elsewhere_changes_nothing(name: str, place: str, tmp_path: Path):
    model = make()
    batch = tiny_batch(model.config)
    model.save_pretrained(tmp_path / "model")
    split = ChorusForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=dict.fromkeys(PARTS, "cpu") | {name: place}, offload_folder=tmp_path / "weights"
    )
    assert torch.equal(logits_of(split, batch), logits_of(model, batch))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(split.generate(**inputs, **options), model.generate(**inputs, **options))
    away = {parameter.device.type for parameter in split.get_submodule(name).parameters()}
    assert away == ({"meta"} if place == "disk" else {"cpu"})


def to_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, folder, execution_device="cpu")


def to_memory(model: Any, folder: Path) -> Any:
    return cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize("offload", [to_disk, to_memory])
@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("vit_tiny_patch16_224", None),
        # Reads the weight of its `qkv` without calling it.
        ("beit_base_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    ],
)
def test_a_whole_model_elsewhere_changes_nothing(
    offload: Callable[[Any, Path], Any], architecture: str, model_args: dict[str, Any] | None, tmp_path: Path
):
    changes = {"architecture": architecture} | ({"model_args": model_args} if model_args else {})
    model = make(**changes)
    batch = tiny_batch(model.config)
    assert torch.equal(logits_of(offload(deepcopy(model), tmp_path), batch), logits_of(model, batch))
